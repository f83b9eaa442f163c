//! The Jinja environment of `transformers`, on MiniJinja.

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, functions};

use super::source::{LOOP_FUNCTION, MARKUP_FUNCTION};
use super::{clock, filters, methods, repr};

/// Returns an environment without a template and without variables.
///
/// `trim_blocks`, `lstrip_blocks` and the loop controls are on, as in `transformers`.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax: SyntaxConfig = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(write_as_python);
    filters::add(&mut environment);
    // MiniJinja treats none as an empty sequence, and counts only lists as sequences.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    });
    environment.add_function(LOOP_FUNCTION, loop_items);
    environment.add_function(MARKUP_FUNCTION, markup);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("dict", dict);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    Ok(environment)
}

/// Sets the time that `strftime_now` formats.
pub(super) fn set_time(environment: &mut Environment<'static>, time: DateTime) {
    environment.add_function("strftime_now", move |format: &str| {
        let refused = |error: jiff::Error| format!("strftime_now: the format {format:?} is not understood: {error}");
        clock::strftime(format, time).map_err(|error| Error::new(ErrorKind::InvalidOperation, refused(error)))
    });
}

/// Prints a value like Python's `str`.
fn write_as_python(out: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&repr::str(value)),
    };
    written.map_err(Error::from)
}

/// Implements the function `raise_exception`, with which a template rejects messages.
fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Implements the function `dict`, which takes a mapping or pairs, and keywords.
fn dict(value: Option<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mapping = match value {
        Some(pairs) if matches!(pairs.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            let pairs = pairs.try_iter()?.map(|pair| match pair.try_iter()?.collect::<Vec<_>>() {
                parts if parts.len() == 2 => Ok((parts[0].clone(), parts[1].clone())),
                parts => {
                    let message = format!("dict: a pair must have two values, not {}", parts.len());
                    Err(Error::new(ErrorKind::InvalidOperation, message))
                }
            });
            Some(Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?))
        }
        value => value,
    };
    functions::dict(mapping, keywords)
}

/// Returns what a loop iterates over: not none, and of a known length.
fn loop_items(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None => Err(Error::new(ErrorKind::InvalidOperation, "a loop cannot iterate over none")),
        ValueKind::Iterable if value.len().is_none() => Ok(value.try_iter()?.collect()),
        _ => Ok(value),
    }
}

/// Returns a string that is safe in HTML, with the escapes of MarkupSafe.
fn markup(text: &Value) -> Result<Value, Error> {
    if text.is_safe() {
        return Ok(text.clone());
    }
    let Some(plain) = text.as_str() else {
        let message = format!("only a string can be added to a safe string, not {}", text.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    };
    let mut out = String::with_capacity(plain.len());
    for c in plain.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    Ok(Value::from_safe_string(out))
}
