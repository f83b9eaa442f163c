//! The subset of Python's pickle format in which PyTorch writes a dictionary of tensors.
//!
//! A pickle is a program for a stack machine that can call any Python function. This reader knows the instructions that
//! a dictionary of tensors needs, and builds the values of the four functions that PyTorch calls there. Anything else
//! is an error; nothing is ever executed.

use std::{collections::HashMap, rc::Rc};

/// A value on the stack.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool,
    Int(i64),
    Text(Rc<str>),
    /// A list, or a dictionary inside another one: the content is not needed.
    Opaque,
    /// A tuple; its items are no tuples of tuples.
    Tuple(Rc<[Value]>),
    Dict(Rc<Vec<(Rc<str>, Value)>>),
    /// The name of a Python class or function.
    Global(Rc<str>),
    Storage(Rc<Storage>),
    Tensor(Rc<Tensor>),
}

/// The memory that one or several tensors share.
#[derive(Debug)]
pub(super) struct Storage {
    /// PyTorch's class, such as `torch.FloatStorage`.
    pub class: Rc<str>,
    /// The name of the file in the archive that holds the values.
    pub key: Rc<str>,
}

/// A view of a storage; offset and strides are in elements.
#[derive(Debug)]
pub(super) struct Tensor {
    pub storage: Rc<Storage>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// An entry of a dictionary of tensors.
pub(super) type NamedTensor = (Rc<str>, Rc<Tensor>);

/// Reads the dictionary of tensors in a pickle.
///
/// # Errors
/// If the pickle is malformed, or is or contains anything else; the message says what was found.
pub(super) fn read_tensors(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    let mut machine = Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let Value::Dict(entries) = machine.run()? else { return Err("something else than a dictionary".to_owned()) };
    let tensor = |(name, value): (Rc<str>, Value)| match value {
        Value::Tensor(tensor) => Ok((name, tensor)),
        other => Err(format!("{} at {name}", other.kind())),
    };
    Rc::unwrap_or_clone(entries).into_iter().map(tensor).collect()
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a bool",
            Self::Int(_) => "an int",
            Self::Text(_) => "a string",
            Self::Opaque => "a list or dictionary",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a Python class or function",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }

    fn text(&self) -> Result<Rc<str>, String> {
        match self {
            Self::Text(text) => Ok(Rc::clone(text)),
            other => Err(format!("{} in place of a string", other.kind())),
        }
    }

    fn index(&self) -> Result<usize, String> {
        match self {
            Self::Int(number) => usize::try_from(*number).map_err(|_| format!("the size {number}")),
            other => Err(format!("{} in place of a size", other.kind())),
        }
    }

    fn indices(&self) -> Result<Vec<usize>, String> {
        match self {
            Self::Tuple(items) => items.iter().map(Self::index).collect(),
            other => Err(format!("{} in place of a shape", other.kind())),
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let code = self.array::<1>()?[0];
            match code {
                b'.' => return self.pop(),
                0x80 => drop(self.array::<1>()?),
                0x95 => drop(self.array::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'q' => {
                    let slot = self.array::<1>()?[0].into();
                    self.memoize(slot)?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len() as u32)?,
                b'h' => {
                    let slot = self.array::<1>()?[0].into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot)?;
                }
                b'a' => drop(self.pop()?),
                b'e' => drop(self.pop_marked()?),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_marked()?;
                    self.set_items(items)?;
                }
                // The state of an object: a state dict's `_metadata`, the versions of its modules.
                b'b' => drop(self.pop()?),
                b'R' => self.call()?,
                b'Q' => self.storage()?,
                _ => {
                    let value = self.constant(code)?;
                    self.stack.push(value);
                }
            }
        }
    }

    /// Reads an instruction that puts a value on the stack.
    fn constant(&mut self, code: u8) -> Result<Value, String> {
        Ok(match code {
            b'N' => Value::None,
            0x88 | 0x89 => Value::Bool,
            b'K' => Value::Int(self.array::<1>()?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => {
                let length = self.array::<1>()?[0].into();
                let bytes = self.take(length)?;
                let mut wide = [if bytes.last().is_some_and(|&last| last > 127) { 255 } else { 0 }; 8];
                wide.get_mut(..length).ok_or("an int of more than 64 bits")?.copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
            b'G' => {
                self.array::<8>()?;
                Value::None
            }
            b'U' | 0x8c => {
                let length = self.array::<1>()?[0].into();
                self.string(length)?
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?) as usize;
                self.string(length)?
            }
            b'c' => Value::Global(format!("{}.{}", self.line()?, self.line()?).into()),
            0x93 => {
                let (name, module) = (self.pop()?.text()?, self.pop()?.text()?);
                Value::Global(format!("{module}.{name}").into())
            }
            b']' => Value::Opaque,
            b'}' => Value::Dict(Rc::default()),
            b')' => Value::Tuple(Rc::new([])),
            b't' => self.pop_marked().and_then(tuple)?,
            0x85..=0x87 => {
                let start = self.stack.len().checked_sub((code - 0x84).into()).ok_or(TRUNCATED)?;
                tuple(self.stack.split_off(start))?
            }
            other => return Err(format!("the pickle instruction {other:#04x}, which no dictionary of tensors needs")),
        })
    }

    /// Calls one of PyTorch's functions that build a dictionary of tensors.
    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Global(function)) = (arguments, function) else {
            return Err("a call of something that is no function".to_owned());
        };
        let value = match (&*function, &*arguments) {
            ("collections.OrderedDict", []) => Value::Dict(Rc::default()),
            ("torch._utils._rebuild_tensor_v2", [Value::Storage(storage), offset, shape, strides, rest @ ..]) => {
                // After `requires_grad` and the hooks; it tells that a tensor is negated, for example.
                match rest.get(2) {
                    None | Some(Value::None) => {}
                    Some(Value::Dict(metadata)) if metadata.is_empty() => {}
                    Some(_) => return Err("a tensor with metadata, such as a negated one".to_owned()),
                }
                let (offset, shape, strides) = (offset.index()?, shape.indices()?, strides.indices()?);
                Value::Tensor(Rc::new(Tensor { storage: Rc::clone(storage), offset, shape, strides }))
            }
            ("torch._utils._rebuild_parameter", [Value::Tensor(tensor), ..]) => Value::Tensor(Rc::clone(tensor)),
            _ => return Err(format!("a call of {function}, which is not executed")),
        };
        self.stack.push(value);
        Ok(())
    }

    /// Replaces the identifier `('storage', class, key, device, length)` on the stack by the storage.
    fn storage(&mut self) -> Result<(), String> {
        let identifier = self.pop()?;
        let Value::Tuple(parts) = &identifier else { return Err("a storage without an identifier".to_owned()) };
        let [_, Value::Global(class), Value::Text(key), ..] = &**parts else {
            return Err("a storage whose identifier has another form".to_owned());
        };
        self.stack.push(Value::Storage(Rc::new(Storage { class: Rc::clone(class), key: Rc::clone(key) })));
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Value>) -> Result<(), String> {
        let Some(Value::Dict(entries)) = self.stack.last_mut() else { return Err("items of no dictionary".to_owned()) };
        // The memo refers to a dictionary before it is filled; a copy for each reference could take any memory.
        if Rc::strong_count(entries) > 1 && !entries.is_empty() {
            return Err("a dictionary that is filled after it was referred to".to_owned());
        }
        for pair in items.chunks_exact(2) {
            let value = if matches!(pair[1], Value::Dict(_)) { Value::Opaque } else { pair[1].clone() };
            Rc::make_mut(entries).push((pair[0].text()?, value));
        }
        Ok(())
    }

    fn memoize(&mut self, slot: u32) -> Result<(), String> {
        let value = self.stack.last().ok_or(TRUNCATED)?.clone();
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), String> {
        let value = self.memo.get(&slot).ok_or(TRUNCATED)?.clone();
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| TRUNCATED.to_owned())
    }

    fn pop_marked(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(TRUNCATED)?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, length: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(length).ok_or(TRUNCATED)?;
        let bytes = self.bytes.get(self.at..end).ok_or(TRUNCATED)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| TRUNCATED.to_owned())
    }

    fn string(&mut self, length: usize) -> Result<Value, String> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "a string that is not UTF-8")?;
        Ok(Value::Text(text.into()))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).ok_or(TRUNCATED)?;
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or(TRUNCATED)?;
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(line)
    }
}

const TRUNCATED: &str = "a pickle that ends too early";

fn tuple(items: Vec<Value>) -> Result<Value, String> {
    let is_tuple = |value: &Value| matches!(value, Value::Tuple(_));
    let deep = |value: &Value| matches!(value, Value::Tuple(items) if items.iter().any(is_tuple));
    if items.iter().any(deep) {
        Err("values that are nested too deeply".to_owned())
    } else {
        Ok(Value::Tuple(items.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_dictionary_of_tensors_is_read() {
        for (pickle, expected) in [
            (
                &b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true\x85R."[..],
                "a call of os.system, which is not executed",
            ),
            (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "an int at a"),
            (b"\x80\x02K\x01.", "something else than a dictionary"),
            (b"\x80\x02}q\x00", "ends too early"),
            (b"\x80\x02h\x07.", "ends too early"),
            (b"\x80\x02\x86.", "ends too early"),
            (b"\x80\x02(u.", "items of no dictionary"),
            (b"\x80\x02X\xff\xff\xff\xffa.", "ends too early"),
            (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction 0x81"),
            (&[&b"\x80\x02)"[..], &[0x85; 5000], b"."].concat(), "nested too deeply"),
        ] {
            let error = read_tensors(pickle).unwrap_err();
            assert!(error.contains(expected), "{error} for {pickle:?}");
        }
        assert!(read_tensors(b"\x80\x02ccollections\nOrderedDict\n)Rq\x00.").unwrap().is_empty());
    }

    /// A dictionary of one tensor `a [2, 3]`, as PyTorch writes it.
    const ONE: &[u8] = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((\
        X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07Q\
        K\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds.";

    #[test]
    fn a_pickle_with_any_byte_changed_or_cut_off_anywhere_is_read_or_refused() {
        let tensors = read_tensors(ONE).unwrap();
        let (name, tensor) = &tensors[0];
        assert_eq!((&**name, &*tensor.storage.class, &*tensor.storage.key), ("a", "torch.FloatStorage", "0"));
        assert_eq!((tensor.offset, &tensor.shape[..], &tensor.strides[..]), (0, &[2, 3][..], &[3, 1][..]));
        for at in 0..ONE.len() {
            assert!(read_tensors(&ONE[..at]).is_err(), "cut off at {at}");
            for byte in 0..=255 {
                let mut changed = ONE.to_vec();
                changed[at] = byte;
                // No panic is all that is asked for.
                let _ = read_tensors(&changed);
            }
        }
    }
}
