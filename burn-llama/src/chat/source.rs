//! The source of a template as the engine reads it, where its syntax differs from that of Jinja2.

use std::ops::Range;

/// The name of the filter that stands for the operator `%` after a string.
pub(super) const PERCENT_FILTER: &str = "percent_format";
/// The name of the function around the iterable of a loop.
pub(super) const LOOP_FUNCTION: &str = "loop_items";

/// The name of the function around what is added to a `safe` string.
pub(super) const MARKUP_FUNCTION: &str = "markup";

/// An end of a part of an expression, beside the bracket or the tag around it.
struct End {
    /// Operators outside brackets.
    operators: &'static [char],
    /// Words outside brackets.
    keywords: &'static [&'static str],
}

const KEYWORDS: &[&str] = &["and", "or", "not", "in", "is", "if", "else"];
/// The end of an operand of `%`.
const PRODUCT_END: End =
    End { operators: &['*', '/', '%', '+', '-', '~', '<', '>', '=', '!', ',', ':'], keywords: KEYWORDS };
/// The end of an operand of `~`, which binds less tightly than `*`.
const CONCATENATION_END: End = End { operators: &['+', '-', '~', '<', '>', '=', '!', ',', ':'], keywords: KEYWORDS };
/// The end of an operand of `+`.
const SUM_END: End = End { operators: &['+', '-', '<', '>', '=', '!', ',', ':'], keywords: KEYWORDS };
/// The end of the variables of a loop.
const TARGET_END: End = End { operators: &[], keywords: &["in"] };
/// The end of the iterable of a loop.
const ITERABLE_END: End = End { operators: &[','], keywords: &["if", "recursive"] };

/// Returns the source with the differences of the engine from Jinja2 written out:
///
/// - line ends are `\n`, as Jinja2's lexer makes them;
/// - the `generation` tags of `transformers`, which mark the assistant's tokens, are conditions that always hold. These
///   also print their content, and trim white space around a tag in the same way;
/// - a line end after `raw` is kept;
/// - strings have the escapes of Python;
/// - `'…' % operand` is a filter, because the engine's `%` takes numbers only;
/// - a right operand of `~` goes through the filter `string`, which writes floats as Python does;
/// - what is added to a `safe` string goes through a function that escapes it for HTML, as MarkupSafe does;
/// - what a loop iterates over goes through a function that refuses none, which is an empty list for the engine, and
///   knows the length of a generator, as the loops of Jinja2 do.
pub(super) fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = next_tag(rest) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let used = if rest.starts_with("{#") {
            let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            end
        } else if let Some(used) = write_raw(rest, &mut out) {
            used
        } else {
            write_tag(rest, &mut out)
        };
        rest = &rest[used..];
    }
    out.push_str(rest);
    out
}

/// Returns the position of the next tag, expression or comment.
fn next_tag(text: &str) -> Option<usize> {
    let mut starts = text.match_indices('{').map(|(start, _)| start);
    starts.find(|start| text[start + 1..].starts_with(['{', '%', '#']))
}

/// Returns the range of the word and the end of a tag such as `{%- raw %}` at the start of a text.
fn lone_word(text: &str, word: &str) -> Option<(Range<usize>, usize)> {
    let inside = text.strip_prefix("{%")?;
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside).trim_start();
    let start = text.len() - inside.len();
    let after = inside.strip_prefix(word)?.trim_start();
    let after = after.strip_prefix(['-', '+']).unwrap_or(after).strip_prefix("%}")?;
    Some((start..start + word.len(), text.len() - after.len()))
}

/// Writes a `raw` block and returns its length; `None` if the text does not start with one.
fn write_raw(text: &str, out: &mut String) -> Option<usize> {
    let (word, body) = lone_word(text, "raw")?;
    out.push_str(&text[..word.end]);
    // The engine drops a line end after `raw` with trim_blocks, Jinja2 does not.
    let sign = text[word.end..body].trim_start();
    out.push_str(if sign.starts_with(['-', '+']) { &text[word.end..body] } else { " +%}" });
    let tags = text[body..].match_indices("{%").map(|(start, _)| body + start);
    let ends = tags.filter_map(|start| lone_word(&text[start..], "endraw").map(|(_, length)| start + length));
    let end = ends.min().unwrap_or(text.len());
    out.push_str(&text[body..end]);
    Some(end)
}

/// Writes the tag or expression at the start of a text and returns its length.
fn write_tag(text: &str, out: &mut String) -> usize {
    for (word, replacement) in [("generation", "if true"), ("endgeneration", "endif")] {
        if let Some((range, end)) = lone_word(text, word) {
            out.push_str(&text[..range.start]);
            out.push_str(replacement);
            out.push_str(&text[range.end..end]);
            return end;
        }
    }
    let close = if text.starts_with("{%") { "%}" } else { "}}" };
    out.push_str(&text[..2]);
    let header = write_loop_header(&text[2..], out);
    2 + header + write_expression(&text[2 + header..], close, out)
}

/// Writes `for variables in iterable` and returns its length; 0 if the text is something else.
fn write_loop_header(text: &str, out: &mut String) -> usize {
    let word = text.strip_prefix(['-', '+']).unwrap_or(text).trim_start();
    if !word.strip_prefix("for").is_some_and(|rest| rest.starts_with(char::is_whitespace)) {
        return 0;
    }
    let target = text.len() - word.len() + 3;
    let iterable = target + part_length(&text[target..], "%}", &TARGET_END) + 2;
    if !text.get(..iterable).is_some_and(|header| header.ends_with("in")) {
        return 0;
    }
    let end = iterable + part_length(&text[iterable..], "%}", &ITERABLE_END);
    if text[end..].starts_with(',') {
        return 0;
    }
    out.push_str(&text[..iterable]);
    out.push_str(&format!(" {LOOP_FUNCTION}("));
    write_expression(&text[iterable..end], "%}", out);
    out.push_str(") ");
    end
}

/// Writes an expression up to and including `close`, and returns the length that was read.
fn write_expression(text: &str, close: &str, out: &mut String) -> usize {
    let mut position = 0;
    let mut depth = 0_usize;
    while let Some(c) = text[position..].chars().next() {
        let rest = &text[position..];
        if depth == 0 && rest.starts_with(close) {
            out.push_str(close);
            return position + close.len();
        }
        position += match c {
            '\'' | '"' => {
                let length = string_length(rest);
                write_string(&rest[..length], out);
                length + write_percent(&rest[length..], close, out)
            }
            '~' => 1 + write_concatenation(&rest[1..], close, out),
            _ => {
                match c {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                let is_filter = out.trim_end().ends_with('|');
                let length = word_length(rest).max(c.len_utf8());
                out.push_str(&rest[..length]);
                match &rest[..length] {
                    "safe" if is_filter => length + write_markup_sum(&rest[length..], close, out),
                    _ => length,
                }
            }
        };
    }
    position
}

/// Writes `+ operand + operand`, which follows a `safe` string, and returns its length.
fn write_markup_sum(text: &str, close: &str, out: &mut String) -> usize {
    let mut position = 0;
    loop {
        let operator = text[position..].trim_start();
        if !operator.starts_with('+') || operator[1..].starts_with(close) {
            return position;
        }
        let start = text.len() - operator.len() + 1;
        position = start + part_length(&text[start..], close, &SUM_END);
        out.push_str(&format!(" + {MARKUP_FUNCTION}("));
        write_expression(&text[start..position], close, out);
        out.push_str(") ");
    }
}

/// Writes `% operand`, which follows a string, as a filter and returns its length; 0 if the text is something else.
fn write_percent(text: &str, close: &str, out: &mut String) -> usize {
    let operator = text.trim_start();
    if !operator.starts_with('%') || operator.starts_with("%}") {
        return 0;
    }
    let operand = &operator[1..];
    let length = part_length(operand, close, &PRODUCT_END);
    out.push_str(&format!(" | {PERCENT_FILTER}("));
    // The operand may hold strings with operands of their own.
    write_expression(&operand[..length], close, out);
    out.push_str(") ");
    text.len() - operand.len() + length
}

/// Writes `~ operand`, given the text after `~`, and returns the length of the operand.
fn write_concatenation(text: &str, close: &str, out: &mut String) -> usize {
    let length = part_length(text, close, &CONCATENATION_END);
    let operand = text[..length].trim();
    let is_string = operand.starts_with(['\'', '"']) && string_length(operand) == operand.len();
    out.push('~');
    // A test after the operand would see a string.
    if is_string || operand.is_empty() || text[length..].starts_with("is") {
        write_expression(&text[..length], close, out);
    } else {
        out.push_str(" (");
        write_expression(&text[..length], close, out);
        out.push_str(") | string ");
    }
    length
}

/// Returns the length of the part of an expression up to an end, a closing bracket or the end of the tag.
fn part_length(text: &str, close: &str, end: &End) -> usize {
    // Signs at the start belong to the operand.
    let mut position = text.len() - text.trim_start_matches([' ', '\n', '\t', '-', '+']).len();
    let mut depth = 0_usize;
    while let Some(c) = text[position..].chars().next() {
        let rest = &text[position..];
        let word = word_length(rest);
        let closes = rest.trim_start_matches(['-', '+']).starts_with(close);
        if depth == 0 && (closes || end.keywords.contains(&&rest[..word]) || end.operators.contains(&c)) {
            break;
        }
        position += match c {
            '\'' | '"' => string_length(rest),
            ')' | ']' | '}' if depth == 0 => break,
            _ => {
                match c {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth -= 1,
                    _ => {}
                }
                word.max(c.len_utf8())
            }
        };
    }
    position
}

/// Returns the length of the name or number at the start of a text.
fn word_length(text: &str) -> usize {
    let is_number = text.starts_with(|c: char| c.is_ascii_digit());
    let mut before = ' ';
    let end = text.find(|c: char| {
        let is_exponent = matches!(c, '+' | '-') && matches!(before, 'e' | 'E');
        before = c;
        !(c.is_alphanumeric() || c == '_' || (is_number && (c == '.' || is_exponent)))
    });
    end.unwrap_or(text.len())
}

/// Returns the length of the string, quotes included, at the start of a text.
fn string_length(text: &str) -> usize {
    let quote = text.chars().next();
    let mut escaped = false;
    for (position, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if Some(c) == quote => return position + 1,
            _ => {}
        }
    }
    text.len()
}

/// Writes a string so that the engine reads the escapes in it as Python does.
fn write_string(text: &str, out: &mut String) {
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match characters.next() {
            Some('\n') => {}
            Some('/') => out.push_str("\\\\/"),
            Some('a') => out.push_str("\\x07"),
            Some('v') => out.push_str("\\x0b"),
            escaped => {
                out.push(c);
                out.extend(escaped);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::prepared;

    #[test]
    fn only_the_differences_are_rewritten() {
        for (source, expected) in [
            ("a\r\nb\rc", "a\nb\nc"),
            ("{%- generation -%}x{% endgeneration %}", "{%- if true -%}x{% endif %}"),
            ("{{ '{% generation %}' }}{# {% generation %} #}", "{{ '{% generation %}' }}{# {% generation %} #}"),
            ("{% raw %}{% generation %}{%- endraw %}", "{% raw +%}{% generation %}{%- endraw %}"),
            ("{{ 'a%s' % x.y(1) | f ~ 'b' }}", "{{ 'a%s' | percent_format( x.y(1) | f ) ~ 'b' }}"),
            ("{{ 'a' ~ x.y * 2 + 1 ~ z is string }}", "{{ 'a' ~ ( x.y * 2 ) | string + 1 ~ z is string }}"),
            ("{{ f('a' ~ -x, [y ~ '%']) }}", "{{ f('a' ~ ( -x) | string , [y ~ '%']) }}"),
            ("{%- for a, b in x | f if a ~ b -%}", "{%- for a, b in loop_items( x | f ) if a ~ ( b ) | string -%}"),
            ("{% for a in x-%}{% for_a = 1 %}", "{% for a in loop_items( x) -%}{% for_a = 1 %}"),
            ("{{ 'a' ~ 1e-5 ~ 2.5-1 }}", "{{ 'a' ~ ( 1e-5 ) | string ~ ( 2.5) | string -1 }}"),
            ("{{ 'a' | safe + b + 'c'|safe }}", "{{ 'a' | safe + markup( b )  + markup( 'c'|safe ) }}"),
            ("{{ safe + b }}{% set a = b | safe +%}", "{{ safe + b }}{% set a = b | safe +%}"),
            ("{% for a in 1, 2 %}", "{% for a in 1, 2 %}"),
            ("{% if x % 2 %}{{ {'a': {}} }}{{ '%' }}", "{% if x % 2 %}{{ {'a': {}} }}{{ '%' }}"),
            ("{% set x = '50%' %}{% set y = '%'-%}", "{% set x = '50%' %}{% set y = '%'-%}"),
            ("{{ '\\/\\v\\d' }}{{ 'open", "{{ '\\\\/\\x0b\\d' }}{{ 'open"),
        ] {
            assert_eq!(prepared(source), expected);
        }
    }
}
