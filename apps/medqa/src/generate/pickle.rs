//! Pickles of plain values: dictionaries, lists and texts.
//!
//! A pickle is a program for a stack machine that can call any Python function. This reader knows only the instructions
//! that build plain values and refuses every other one by its name, so nothing can be executed.

use std::collections::HashMap;

/// Records by the name of their entity: pairs of a predicate and its values.
pub(super) type PickledRecords = Vec<(String, Vec<(String, Vec<String>)>)>;

/// A value on the stack. Containers are filled in place by their number, so that the memo can refer to them.
#[derive(Debug, Clone)]
enum PickledValue {
    Text(String),
    List(usize),
    Dict(usize),
    Other,
    Mark,
}

const TRUNCATED: &str = "the pickle ends too early";

/// Reads a dictionary of entities, each a dictionary of lists of texts.
///
/// # Errors
/// If the pickle has an instruction that plain values do not need, is malformed, or holds something else.
pub(super) fn read(bytes: &[u8]) -> Result<PickledRecords, String> {
    let mut machine = PlainMachine::default();
    let top = machine.run(bytes)?;
    let PickledValue::Dict(top) = top else { return Err("expected a dictionary of entities".to_owned()) };
    let entities = std::mem::take(&mut machine.dicts[top]);
    let mut records = Vec::with_capacity(entities.len());
    for (name, value) in entities {
        let PickledValue::Dict(fields) = value else {
            return Err(format!("{name}: expected a dictionary of predicates"));
        };
        let fields = machine.dicts[fields].iter().map(|(predicate, value)| (predicate.clone(), machine.texts(value)));
        records.push((name, fields.collect()));
    }
    Ok(records)
}

#[derive(Default)]
struct PlainMachine {
    stack: Vec<PickledValue>,
    memo: HashMap<u64, PickledValue>,
    lists: Vec<Vec<PickledValue>>,
    dicts: Vec<Vec<(String, PickledValue)>>,
}

impl PlainMachine {
    /// Returns the texts of a list, or a text alone.
    fn texts(&self, value: &PickledValue) -> Vec<String> {
        let text = |value: &PickledValue| if let PickledValue::Text(text) = value { Some(text.clone()) } else { None };
        match value {
            PickledValue::List(index) => self.lists[*index].iter().filter_map(text).collect(),
            value => text(value).into_iter().collect(),
        }
    }

    fn run(&mut self, bytes: &[u8]) -> Result<PickledValue, String> {
        let mut input = PickleInput { bytes, at: 0 };
        loop {
            match input.take(1)?[0] {
                b'.' => return self.pop(),
                0x80 => drop(input.take(1)?),
                0x95 => drop(input.take(8)?),
                b'(' => self.stack.push(PickledValue::Mark),
                b'V' | b'S' => {
                    let text = input.line()?;
                    self.stack.push(PickledValue::Text(unescaped(&text)));
                }
                b'X' => self.text(&mut input, 4)?,
                0x8c => self.text(&mut input, 1)?,
                b'I' | b'F' => {
                    input.line()?;
                    self.stack.push(PickledValue::Other);
                }
                b'N' | 0x88 | 0x89 => self.stack.push(PickledValue::Other),
                b']' => self.new_list(Vec::new()),
                b'l' => {
                    let items = self.pop_marked()?;
                    self.new_list(items);
                }
                b'}' => self.new_dict(),
                b'd' => {
                    let items = self.pop_marked()?;
                    self.new_dict();
                    self.set_items(items)?;
                }
                b'p' => {
                    let slot = input.line()?.parse().map_err(|_| "a memo without a number")?;
                    self.memoize(slot)?;
                }
                b'q' => {
                    let slot = input.number(1)?;
                    self.memoize(slot)?;
                }
                b'r' => {
                    let slot = input.number(4)?;
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len() as u64)?,
                b'g' => {
                    let slot = input.line()?.parse().map_err(|_| "a memo without a number")?;
                    self.recall(slot)?;
                }
                b'h' => {
                    let slot = input.number(1)?;
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = input.number(4)?;
                    self.recall(slot)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_marked()?;
                    self.append(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_marked()?;
                    self.set_items(items)?;
                }
                other => return Err(refusal(other)),
            }
        }
    }

    fn text(&mut self, input: &mut PickleInput, width: usize) -> Result<(), String> {
        let length = usize::try_from(input.number(width)?).map_err(|_| TRUNCATED)?;
        let text = std::str::from_utf8(input.take(length)?).map_err(|_| "a text that is not UTF-8")?;
        self.stack.push(PickledValue::Text(text.to_owned()));
        Ok(())
    }

    fn new_list(&mut self, items: Vec<PickledValue>) {
        self.lists.push(items);
        self.stack.push(PickledValue::List(self.lists.len() - 1));
    }

    fn new_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(PickledValue::Dict(self.dicts.len() - 1));
    }

    fn append(&mut self, items: Vec<PickledValue>) -> Result<(), String> {
        let Some(PickledValue::List(list)) = self.stack.last() else { return Err("items of no list".to_owned()) };
        self.lists[*list].extend(items);
        Ok(())
    }

    fn set_items(&mut self, items: Vec<PickledValue>) -> Result<(), String> {
        let Some(PickledValue::Dict(dict)) = self.stack.last() else { return Err("items of no dictionary".to_owned()) };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            let PickledValue::Text(key) = key else { return Err("a key that is no text".to_owned()) };
            self.dicts[*dict].push((key, value));
        }
        Ok(())
    }

    fn memoize(&mut self, slot: u64) -> Result<(), String> {
        let value = self.stack.last().ok_or(TRUNCATED)?.clone();
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Result<(), String> {
        let value = self.memo.get(&slot).ok_or("a memo that was not set")?.clone();
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<PickledValue, String> {
        match self.stack.pop() {
            None | Some(PickledValue::Mark) => Err(TRUNCATED.to_owned()),
            Some(value) => Ok(value),
        }
    }

    fn pop_marked(&mut self) -> Result<Vec<PickledValue>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, PickledValue::Mark)).ok_or(TRUNCATED)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }
}

/// Says why an instruction is refused.
fn refusal(code: u8) -> String {
    let call = match code {
        b'c' | 0x93 => "it names a Python class or function (GLOBAL)",
        b'R' => "it calls a Python function (REDUCE)",
        b'b' => "it sets the state of an object (BUILD)",
        b'i' | b'o' | 0x81 | 0x92 => "it creates an object of a class (INST, OBJ, NEWOBJ)",
        b'P' | b'Q' => "it refers to an object outside (PERSID)",
        0x82..=0x84 => "it uses an extension (EXT)",
        _ => return format!("the instruction {code:#04x} is none of plain dictionaries, lists and texts"),
    };
    format!("{call}, which could run code; nothing was executed")
}

/// Resolves `\\uXXXX` and `\\UXXXXXXXX`, which protocol 0 writes for characters beyond Latin 1, and takes quotes off.
fn unescaped(text: &str) -> String {
    if !text.contains('\\') {
        return text.to_owned();
    }
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        result.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        let length = match tail.as_bytes().first() {
            Some(b'u') => 4,
            Some(b'U') => 8,
            _ => 0,
        };
        let code =
            tail.get(1..1 + length).filter(|_| length > 0).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => {
                result.push(c);
                rest = &tail[1 + length..];
            }
            None => {
                result.push('\\');
                rest = tail;
            }
        }
    }
    result + rest
}

struct PickleInput<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> PickleInput<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(length).ok_or(TRUNCATED)?;
        let bytes = self.bytes.get(self.at..end).ok_or(TRUNCATED)?;
        self.at = end;
        Ok(bytes)
    }

    fn number(&mut self, width: usize) -> Result<u64, String> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Reads a line. Protocol 0 writes characters of Latin 1 as one byte each.
    fn line(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).ok_or(TRUNCATED)?;
        let length = rest.iter().position(|byte| *byte == b'\n').ok_or(TRUNCATED)?;
        self.at += length + 1;
        Ok(rest[..length].iter().map(|byte| char::from(*byte)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `{"高血压": {"常见症状": ["乏力", "头痛"]}}` in protocol 0 and in protocol 2, as Python writes it.
    const PROTOCOL_0: &[u8] =
        b"(dp0\nV\\u9ad8\\u8840\\u538b\np1\n(dp2\nV\\u5e38\\u89c1\\u75c7\\u72b6\np3\n(lp4\nV\\u4e4f\\u529b\np5\n\
        aV\\u5934\\u75db\np6\nass.";
    const PROTOCOL_2: &[u8] =
        b"\x80\x02}q\x00X\x09\x00\x00\x00\xe9\xab\x98\xe8\xa1\x80\xe5\x8e\x8bq\x01}q\x02X\x0c\x00\x00\x00\
        \xe5\xb8\xb8\xe8\xa7\x81\xe7\x97\x87\xe7\x8a\xb6q\x03]q\x04(X\x06\x00\x00\x00\xe4\xb9\x8f\xe5\x8a\x9bq\x05\
        X\x06\x00\x00\x00\xe5\xa4\xb4\xe7\x97\x9bq\x06ess.";

    #[test]
    fn plain_values_are_read_and_calls_are_refused_by_name() {
        assert_eq!(unescaped("5 \\u00b5g \u{b5}g \\U0001f600\\x"), "5 µg µg \u{1f600}\\x");
        let text = str::to_owned;
        let expected = vec![(text("高血压"), vec![(text("常见症状"), vec![text("乏力"), text("头痛")])])];
        assert_eq!(read(PROTOCOL_0), Ok(expected.clone()));
        assert_eq!(read(PROTOCOL_2), Ok(expected));
        for (pickle, words) in [
            (&b"cos\nsystem\n(S'true'\ntR."[..], "GLOBAL"),
            (b"(dp0\nR.", "REDUCE"),
            (b"\x80\x02}\x81.", "NEWOBJ"),
            (b"}b.", "BUILD"),
            (b"}t.", "instruction 0x74"),
            (b"(lp0\n.", "expected a dictionary"),
            (b"}", "ends too early"),
            (b"g7\n.", "memo that was not set"),
        ] {
            let error = read(pickle).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_pickle_with_any_byte_changed_or_cut_off_anywhere_is_read_or_refused() {
        for pickle in [PROTOCOL_0, PROTOCOL_2] {
            for at in 0..pickle.len() {
                assert!(read(&pickle[..at]).is_err(), "cut off at {at}");
                for byte in 0..=255 {
                    let mut changed = pickle.to_vec();
                    changed[at] = byte;
                    // No panic is all that is asked for.
                    let _ = read(&changed);
                }
            }
        }
    }
}
