//! Python's `str` and `repr` of the values in a template.

use minijinja::value::{Value, ValueKind};

/// Returns a float as Python writes it: the shortest digits that read back to it, with an exponent below 1e-4 and from
/// 1e16 on.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    // Rust changes to an exponent at the same numbers, but writes it without sign and padding.
    let text = format!("{number:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

/// Returns the float in a value that is one.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok())?
}

/// Returns `str(value)`.
pub(super) fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => value.to_string(),
        _ => repr(value),
    }
}

/// Returns `repr(value)`.
pub(super) fn repr(value: &Value) -> String {
    let joined = |open: &str, close: &str, items: Vec<String>| format!("{open}{}{close}", items.join(", "));
    let items = || value.try_iter().map(|items| items.collect::<Vec<_>>()).unwrap_or_default();
    match value.kind() {
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::Number => as_float(value).map_or_else(|| value.to_string(), float),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> = items().iter().map(repr).collect();
            match (value.is_tuple(), items.len()) {
                (true, 1) => joined("(", ",)", items),
                (true, _) => joined("(", ")", items),
                (false, _) => joined("[", "]", items),
            }
        }
        ValueKind::Map => {
            let pair = |key: &Value| {
                let item = value.get_item(key).unwrap_or_default();
                format!("{}: {}", repr(key), repr(&item))
            };
            joined("{", "}", items().iter().map(pair).collect())
        }
        _ => value.to_string(),
    }
}

/// Returns a string in quotes, with escapes for what cannot be printed.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ if u32::from(c) <= 0xff => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            _ if u32::from(c) <= 0xffff => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => out.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    out.push(quote);
    out
}

/// Returns true for the characters that may be placeholders of texts.
pub(super) fn is_placeholder(c: char) -> bool {
    ('\u{e000}'..='\u{f8ff}').contains(&c)
}

/// Returns true if Python's `str.isprintable` does so for the character, and for private-use characters, which stand for
/// texts that must not become control tokens. The standard library escapes the same categories in `Debug`, and combining
/// characters at the start of a string besides.
pub(super) fn is_printable(c: char) -> bool {
    if is_placeholder(c) {
        return true;
    }
    let text = String::from_iter(['a', c]);
    matches!(c, '\'' | '"' | '\\') || text.escape_debug().eq(text.chars())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_in_python() {
        for (number, expected) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (1e-5, "1e-05"),
            (1e-4, "0.0001"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(number), expected);
        }
    }
}
