//! Operations of Python's `str` on text, where the standard library's differ.

use std::ops::Range;

/// Returns true for the characters that Python's `str.isspace` accepts.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// Returns the bytes of `text[start:end]`, where positions count characters and may be negative; `None` if `start` lies
/// beyond `end`.
pub(super) fn range(text: &str, start: Option<i64>, end: Option<i64>) -> Option<Range<usize>> {
    let length = text.chars().count() as i64;
    let from_front = |position: i64| if position < 0 { (length + position).max(0) } else { position };
    let start = from_front(start.unwrap_or(0));
    let end = from_front(end.unwrap_or(length)).min(length);
    let byte = |position: i64| text.char_indices().nth(position as usize).map_or(text.len(), |(byte, _)| byte);
    (start <= end).then(|| byte(start)..byte(end))
}

/// Returns the lines of a text, split at all of Python's line ends. With `keep` a line has its end.
pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let ends = |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let length = rest.find(ends).unwrap_or(rest.len());
        let end = match &rest[length..] {
            after if after.starts_with("\r\n") => 2,
            after => after.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..length + if keep { end } else { 0 }]);
        rest = &rest[length + end..];
    }
    lines
}

/// Returns the words of a text, at most `limit`; the last is the rest of the text.
pub(super) fn words(text: &str, limit: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let length = if words.len() + 1 >= limit { rest.len() } else { rest.find(is_space).unwrap_or(rest.len()) };
        words.push(&rest[..length]);
        rest = rest[length..].trim_start_matches(is_space);
    }
    words
}

/// Returns the words of a text, at most `limit`, counted from its end; the first is the rest of the text.
pub(super) fn last_words(text: &str, limit: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        let space = rest.char_indices().rfind(|(_, c)| is_space(*c));
        let start = match space {
            Some((position, c)) if words.len() + 1 < limit => position + c.len_utf8(),
            _ => 0,
        };
        words.push(&rest[start..]);
        rest = rest[..start].trim_end_matches(is_space);
    }
    words.reverse();
    words
}

/// Returns a text with a capital at the start of each run of letters and small letters after it.
pub(super) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// Returns a text with capitals and small letters exchanged.
pub(super) fn swapped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_uppercase() {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

/// Returns a text with `indent` before each line but the first. `first` indents that too, `blank` also empty lines.
pub(super) fn indented(text: &str, indent: &str, first: bool, blank: bool) -> String {
    let text = format!("{text}\n");
    let mut out = String::with_capacity(text.len());
    for (index, line) in lines(&text, false).into_iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(indent);
        }
        out.push_str(line);
    }
    out
}
