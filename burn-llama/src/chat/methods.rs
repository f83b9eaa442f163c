//! Methods of Python's values that `minijinja_contrib::pycompat` lacks or does otherwise.

use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::arguments::Arguments;
use super::text;

/// Calls a method of a value. The engine names the method in the error if there is none.
pub(super) fn call(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string_method(text, method, arguments)?,
        (ValueKind::Seq | ValueKind::Iterable | ValueKind::Map, _) if method == "copy" => {
            Arguments::bind(method, [], arguments)?;
            // Values cannot change in a template, as in the sandbox of `transformers`.
            Some(value.clone())
        }
        (ValueKind::Seq | ValueKind::Iterable, _) if method == "index" => Some(position(value, arguments)?),
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, &positional(method, arguments)?),
    }
}

/// Returns the arguments of a method of `pycompat`, which takes them by position.
fn positional(method: &str, arguments: &[Value]) -> Result<Vec<Value>, Error> {
    Ok(match method {
        "replace" => Arguments::bind(method, ["old", "new", "count"], arguments)?.positional(),
        _ => arguments.to_vec(),
    })
}

/// Calls a method of a string; `None` if it is not one of these.
fn string_method(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, method, arguments)?,
        "startswith" | "endswith" => affix(text, method, arguments)?,
        "partition" | "rpartition" => partition(text, method, arguments)?,
        "removeprefix" | "removesuffix" => {
            let arguments = Arguments::bind(method, ["affix"], arguments)?;
            let affix = arguments.text(0)?;
            let shorter = if method == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Value::from(shorter.unwrap_or(text))
        }
        "split" | "rsplit" => split(text, method, arguments)?,
        "splitlines" => {
            let arguments = Arguments::bind(method, ["keepends"], arguments)?;
            text::lines(text, arguments.flag(0)).into_iter().map(Value::from).collect()
        }
        "strip" | "lstrip" | "rstrip" => {
            let arguments = Arguments::bind(method, ["chars"], arguments)?;
            let characters = arguments.optional_text(0)?;
            let strips = |c: char| characters.map_or_else(|| text::is_space(c), |characters| characters.contains(c));
            Value::from(match method {
                "lstrip" => text.trim_start_matches(strips),
                "rstrip" => text.trim_end_matches(strips),
                _ => text.trim_matches(strips),
            })
        }
        "join" => join(text, arguments)?,
        "center" | "ljust" | "rjust" | "zfill" => pad(text, method, arguments)?,
        "title" | "swapcase" => {
            Arguments::bind(method, [], arguments)?;
            Value::from(if method == "title" { text::title(text) } else { text::swapped(text) })
        }
        _ => return Ok(None),
    }))
}

/// Implements `find`, `index` and `count` of strings; positions are counted in characters.
fn search(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind(method, ["sub", "start", "end"], arguments)?;
    let sub = arguments.text(0)?;
    let range = text::range(text, arguments.integer(1)?, arguments.integer(2)?);
    let part = range.clone().map(|range| &text[range]);
    if method == "count" {
        return Ok(Value::from(part.map_or(0, |part| part.matches(sub).count())));
    }
    let found = part.and_then(|part| if method.starts_with('r') { part.rfind(sub) } else { part.find(sub) });
    match (found, range) {
        (Some(found), Some(range)) => Ok(Value::from(text[..range.start + found].chars().count())),
        _ if method.ends_with("find") => Ok(Value::from(-1)),
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: the string does not contain {sub:?}"))),
    }
}

/// Implements `startswith` and `endswith`, which take a string or a tuple of strings.
fn affix(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind(method, ["affix", "start", "end"], arguments)?;
    let affixes = arguments.required(0)?;
    let affixes: Vec<Value> = match affixes.is_tuple() {
        true => affixes.try_iter()?.collect(),
        false => vec![affixes.clone()],
    };
    let Some(range) = text::range(text, arguments.integer(1)?, arguments.integer(2)?) else {
        return Ok(Value::from(false));
    };
    let part = &text[range];
    for affix in &affixes {
        let affix = affix.as_str().ok_or_else(|| arguments.wrong(0, "a string or a tuple of strings"))?;
        if if method == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) } {
            return Ok(Value::from(true));
        }
    }
    Ok(Value::from(false))
}

/// Implements `partition` and `rpartition`.
fn partition(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind(method, ["sep"], arguments)?;
    let separator = not_empty(method, arguments.text(0)?)?;
    let parts = match method {
        "partition" => text.split_once(separator).map_or([text, "", ""], |(head, tail)| [head, separator, tail]),
        _ => text.rsplit_once(separator).map_or(["", "", text], |(head, tail)| [head, separator, tail]),
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// Implements `split` and `rsplit`.
fn split(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind(method, ["sep", "maxsplit"], arguments)?;
    let limit = usize::try_from(arguments.integer(1)?.unwrap_or(-1)).unwrap_or(usize::MAX).saturating_add(1);
    let parts: Vec<&str> = match (arguments.optional_text(0)?, method) {
        (Some(separator), "split") => text.splitn(limit, not_empty(method, separator)?).collect(),
        (Some(separator), _) => {
            let mut parts: Vec<_> = text.rsplitn(limit, not_empty(method, separator)?).collect();
            parts.reverse();
            parts
        }
        (None, "split") => text::words(text, limit),
        (None, _) => text::last_words(text, limit),
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Implements `join`, which takes strings only.
fn join(separator: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind("join", ["iterable"], arguments)?;
    let items: Vec<Value> = arguments.required(0)?.try_iter()?.collect();
    let texts: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
    let texts = texts.ok_or_else(|| arguments.wrong(0, "a sequence of strings"))?;
    Ok(Value::from(texts.join(separator)))
}

/// Implements `center`, `ljust`, `rjust` and `zfill`.
fn pad(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind(method, ["width", "fillchar"], arguments)?;
    arguments.required(0)?;
    let width = usize::try_from(arguments.integer(0)?.unwrap_or(0)).unwrap_or(0);
    let fill = match arguments.optional_text(1)? {
        None if method == "zfill" => '0',
        None => ' ',
        Some(fill) => match (fill.chars().next(), fill.chars().count()) {
            (Some(fill), 1) => fill,
            _ => return Err(arguments.wrong(1, "one character")),
        },
    };
    let missing = width.saturating_sub(text.chars().count());
    let fills = |count: usize| fill.to_string().repeat(count);
    Ok(Value::from(match method {
        "ljust" => format!("{text}{}", fills(missing)),
        "rjust" => format!("{}{text}", fills(missing)),
        "zfill" => {
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            format!("{}{}{digits}", &text[..text.len() - digits.len()], fills(missing))
        }
        _ => {
            // Python puts the odd character on the left if the width is odd, too.
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fills(left), fills(missing - left))
        }
    }))
}

/// Implements `index` of lists.
fn position(value: &Value, arguments: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::bind("index", ["value"], arguments)?;
    let wanted = arguments.required(0)?;
    let found = value.try_iter()?.position(|item| item == *wanted);
    let message = || format!("index: the list does not contain {wanted:?}");
    found.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, message()))
}

/// Returns a separator, which must not be empty.
fn not_empty<'a>(method: &str, separator: &'a str) -> Result<&'a str, Error> {
    match separator.is_empty() {
        true => Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: the separator is empty"))),
        false => Ok(separator),
    }
}
