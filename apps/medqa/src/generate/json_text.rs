//! JSON in the text of an answer: read as it is, or with the repairs that answers of models need.
//!
//! ```text
//! as it is → without mark and code fence → first balanced [...] or {...} → repairs, each of which is named
//! ```

use serde_json::{Map, Number, Value};

/// A value that was found in a text.
#[derive(Debug, PartialEq)]
pub(super) struct FoundJson {
    pub value: Value,
    /// The repairs that were needed, for the counts of the report.
    pub repairs: Vec<&'static str>,
}

/// The deepest nesting that is read.
const MAX_DEPTH: usize = 32;

/// Finds the JSON value in a text.
///
/// # Errors
/// The reason why there is none, for the counts of the report.
pub(super) fn find(text: &str) -> Result<FoundJson, &'static str> {
    let is_container = |value: &Value| value.is_array() || value.is_object();
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok().filter(is_container);
    let found = |value, repair: Option<&'static str>| FoundJson { value, repairs: repair.into_iter().collect() };
    if let Some(value) = parse(text) {
        return Ok(found(value, None));
    }
    let (inside, fence) = without_fence(text.trim_start_matches('\u{feff}'));
    if let Some(value) = parse(inside) {
        return Ok(found(value, Some(if fence { "code fence" } else { "byte order mark" })));
    }
    // Several objects, one after the other, are left to the repairs.
    let alone = |part: &&str| {
        let after = inside.split_once(part).map_or("", |(_, after)| after).trim_start_matches([' ', '\n', '\r', ',']);
        part.starts_with('[') || !after.starts_with('{')
    };
    if let Some(value) = balanced(inside).filter(alone).and_then(parse) {
        return Ok(found(value, Some("text around")));
    }
    repaired(inside)
}

/// Returns the text inside the first code fence, or the whole text.
fn without_fence(text: &str) -> (&str, bool) {
    let Some((_, rest)) = text.split_once("```") else { return (text, false) };
    let body = rest.split_once('\n').map_or(rest, |(first, body)| {
        // The first line may name the language.
        if first.trim().chars().all(char::is_alphanumeric) { body } else { rest }
    });
    (body.split_once("\n```").or_else(|| body.rsplit_once("```")).map_or(body, |(body, _)| body), true)
}

/// Returns the first balanced list or object, not looking at brackets inside strings.
fn balanced(text: &str) -> Option<&str> {
    let start = text.find(['[', '{'])?;
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, c) in text[start..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '[' | '{' if !in_string => depth += 1,
            ']' | '}' if !in_string => {
                depth -= 1;
                if depth == 0 {
                    return text.get(start..start + at + c.len_utf8());
                }
            }
            _ => {}
        }
    }
    None
}

/// Reads a value with repairs.
fn repaired(text: &str) -> Result<FoundJson, &'static str> {
    let start = text.find(['[', '{']).ok_or("no JSON in the answer")?;
    let characters: Vec<char> = text[start..].chars().collect();
    let mut reader = LenientReader { text: &characters, at: 0, depth: 0, lists: 0, repairs: Vec::new() };
    let mut values = vec![reader.value().ok_or("JSON that cannot be repaired")?];
    while values[0].is_object() {
        reader.skip_space();
        reader.skip_if(&[',', '，']);
        reader.skip_space();
        if reader.peek() != Some('{') {
            break;
        }
        match reader.value() {
            Some(value) => values.push(value),
            None => break,
        }
    }
    let value = if values.len() > 1 {
        reader.note("one object after the other");
        Value::Array(values)
    } else {
        values.swap_remove(0)
    };
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let empty = is_empty(&value) || value.as_object().is_some_and(|fields| fields.values().all(is_empty));
    if empty && reader.repairs.contains(&"cut off") {
        return Err("JSON cut off before its first item");
    }
    Ok(FoundJson { value, repairs: reader.repairs })
}

/// A reader of JSON that accepts what models write in its place.
struct LenientReader<'a> {
    text: &'a [char],
    at: usize,
    depth: usize,
    /// Lists around the place.
    lists: usize,
    repairs: Vec<&'static str>,
}

impl LenientReader<'_> {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn note(&mut self, repair: &'static str) {
        if !self.repairs.contains(&repair) {
            self.repairs.push(repair);
        }
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    /// Skips one of the characters and returns it; another one than the first is a full-width form.
    fn skip_if(&mut self, characters: &[char]) -> bool {
        let Some(c) = self.peek().filter(|c| characters.contains(c)) else { return false };
        self.at += 1;
        if characters.first() != Some(&c) {
            self.note("full-width punctuation");
        }
        true
    }

    /// Reads a value; none if it is damaged or incomplete.
    fn value(&mut self) -> Option<Value> {
        self.skip_space();
        match self.peek()? {
            '[' | '{' if self.depth >= MAX_DEPTH => None,
            '[' => self.list(),
            '{' => self.object(),
            '"' | '\'' | '“' | '‘' | '”' => self.string().map(Value::String),
            _ => self.word(),
        }
    }

    fn list(&mut self) -> Option<Value> {
        let mut items = Vec::new();
        self.at += 1;
        self.depth += 1;
        self.lists += 1;
        let mut after_comma = false;
        loop {
            self.skip_space();
            if self.peek() == Some(']') {
                self.at += 1;
                if after_comma {
                    self.note("trailing comma");
                }
                break;
            }
            match self.value() {
                Some(item) => items.push(item),
                // Complete items are kept if the text ends here.
                None if self.at >= self.text.len() => {
                    self.note("cut off");
                    break;
                }
                None => return None,
            }
            self.skip_space();
            after_comma = self.skip_if(&[',', '，']);
            if !after_comma && self.peek() == Some('{') {
                self.note("missing comma");
            } else if !after_comma && !matches!(self.peek(), Some(']') | None) {
                return None;
            }
        }
        self.depth -= 1;
        self.lists -= 1;
        Some(Value::Array(items))
    }

    fn object(&mut self) -> Option<Value> {
        let mut fields = Map::new();
        self.at += 1;
        self.depth += 1;
        let mut after_comma = false;
        loop {
            self.skip_space();
            match self.peek() {
                Some('}') => {
                    self.at += 1;
                    if after_comma {
                        self.note("trailing comma");
                    }
                    break;
                }
                // An item that is cut off is dropped; the object around the list keeps its complete fields.
                None if self.lists > 0 => return None,
                None => {
                    self.note("cut off");
                    break;
                }
                Some(_) => {}
            }
            match self.field() {
                Some((key, value)) => fields.insert(key, value),
                None if self.at >= self.text.len() && self.lists == 0 => {
                    self.note("cut off");
                    break;
                }
                None => return None,
            };
            self.skip_space();
            after_comma = self.skip_if(&[',', '，']);
            if !after_comma && !matches!(self.peek(), Some('}') | None) {
                return None;
            }
        }
        self.depth -= 1;
        Some(Value::Object(fields))
    }

    fn field(&mut self) -> Option<(String, Value)> {
        let key = match self.peek()? {
            '"' | '\'' | '“' | '‘' | '”' => self.string()?,
            c if c.is_alphabetic() || c == '_' => {
                self.note("key without quotes");
                self.letters()
            }
            _ => return None,
        };
        self.skip_space();
        if !self.skip_if(&[':', '：']) {
            return None;
        }
        Some((key, self.value()?))
    }

    fn letters(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_alphanumeric() || "_+-.".contains(c)) {
            self.at += 1;
        }
        self.text[start..self.at].iter().collect()
    }

    /// Reads a number or a name such as `true` or Python's `None`.
    fn word(&mut self) -> Option<Value> {
        let word = self.letters();
        let python = |value| (value, Some("Python's constants"));
        let (value, repair) = match word.as_str() {
            "" => return None,
            "true" => (Value::Bool(true), None),
            "false" => (Value::Bool(false), None),
            "null" => (Value::Null, None),
            "True" => python(Value::Bool(true)),
            "False" => python(Value::Bool(false)),
            "None" | "NaN" => python(Value::Null),
            // A number at the end of the text may go on.
            _ if self.at >= self.text.len() && self.depth > 0 => return None,
            number => match serde_json::from_str::<Number>(number) {
                Ok(number) => (Value::Number(number), None),
                Err(_) => return None,
            },
        };
        repair.into_iter().for_each(|repair| self.note(repair));
        Some(value)
    }

    /// Reads a string in straight, single or curly quotes.
    fn string(&mut self) -> Option<String> {
        let open = self.peek()?;
        let close: &[char] = match open {
            '"' => &['"'],
            '\'' => &['\''],
            '‘' => &['’', '\''],
            _ => &['”', '"', '“'],
        };
        if open != '"' {
            self.note("other quotes");
        }
        self.at += 1;
        let mut text = String::new();
        loop {
            let c = self.peek()?;
            self.at += 1;
            match c {
                '\\' => self.escape(&mut text)?,
                c if close.contains(&c) && self.ends_string() => return Some(text),
                c if close.contains(&c) => {
                    self.note("quotes inside a string");
                    text.push(c);
                }
                '\n' | '\r' | '\t' => {
                    self.note("line break in a string");
                    text.push(c);
                }
                c => text.push(c),
            }
        }
    }

    /// Returns whether a quote before this place ends its string: punctuation of JSON or the end follows.
    fn ends_string(&self) -> bool {
        let next = self.text[self.at..].iter().find(|c| !c.is_whitespace());
        next.is_none_or(|c| ",:]}，：".contains(*c))
    }

    fn escape(&mut self, text: &mut String) -> Option<()> {
        let c = self.peek()?;
        self.at += 1;
        match c {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' | 'f' => text.push(' '),
            'u' => {
                let high = self.hex_unit()?;
                let low = (0xd800..0xdc00).contains(&high) && self.text[self.at..].starts_with(&['\\', 'u']);
                let low = if low {
                    self.at += 2;
                    Some(self.hex_unit()?)
                } else {
                    None
                };
                let units = std::iter::once(high).chain(low);
                text.extend(char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)));
            }
            c => text.push(c),
        }
        Some(())
    }

    fn hex_unit(&mut self) -> Option<u16> {
        let digits: String = self.text.get(self.at..self.at + 4)?.iter().collect();
        self.at += 4;
        u16::from_str_radix(&digits, 16).ok()
    }
}

/// Returns the objects in a found value: those of a list, or of the first list in an object, or the object itself.
pub(super) fn objects(value: Value) -> Vec<Map<String, Value>> {
    let list = match value {
        Value::Array(items) => items,
        Value::Object(mut fields) => {
            let is_list = |value: &Value| value.as_array().is_some_and(|items| items.iter().any(Value::is_object));
            let key = fields.iter().find(|(_, value)| is_list(value)).map(|(key, _)| key.clone());
            match key.and_then(|key| fields.remove(&key)) {
                Some(Value::Array(items)) => items,
                _ => vec![Value::Object(fields)],
            }
        }
        _ => Vec::new(),
    };
    let object = |value| if let Value::Object(fields) = value { Some(fields) } else { None };
    list.into_iter().filter_map(object).collect()
}

#[cfg(test)]
#[path = "json_text_tests.rs"]
mod tests;
