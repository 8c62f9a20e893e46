//! An interpreter of the few pickle opcodes that `torch.save` writes. It makes values and calls nothing: of all Python
//! names it knows those that PyTorch writes for tensors, and refuses a file at the first other one.
//!
//! Opcodes are those of Python's `pickletools` documentation, protocols 2 to 4.

use std::collections::BTreeMap;

use awqc_ir::Stored;

use super::PickleError;
use super::input::Input;

/// A value of the machine's arena.
pub(super) type Id = u32;

/// What a pickle can hold here.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// `None`, and whatever numbers nobody asks for: fractions, large integers.
    Other,
    Bool(bool),
    Int(i64),
    Text(String),
    /// A tuple or list.
    List(Vec<Id>),
    /// In order; a later entry of the same key replaces an earlier one.
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(View),
}

/// The Python names that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    /// `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`, which has more arguments.
    Tensor,
    Parameter,
    Storage(Stored),
}

/// Numbers that tensors look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) stored: Stored,
    pub(super) key: String,
    /// Elements.
    pub(super) len: u64,
}

/// A tensor: a view of a storage. Offset and strides count elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) storage: Storage,
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<u64>,
}

/// Values of one file. PyTorch makes about twenty a tensor.
const MAX_VALUES: usize = 1 << 22;

/// Opcodes of one pickle: they bound what lists and the memo can hold.
const MAX_STEPS: usize = 1 << 25;

fn global(module: &str, name: &str) -> Result<Global, PickleError> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::Tensor,
        ("torch._utils", "_rebuild_parameter") => Global::Parameter,
        ("torch", "FloatStorage") => Global::Storage(Stored::F32),
        ("torch", "HalfStorage") => Global::Storage(Stored::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Stored::Bf16),
        ("torch", "DoubleStorage") => Global::Storage(Stored::F64),
        ("torch", "LongStorage") => Global::Storage(Stored::I64),
        ("torch", "IntStorage") => Global::Storage(Stored::I32),
        ("torch", "ShortStorage") => Global::Storage(Stored::I16),
        ("torch", "CharStorage") => Global::Storage(Stored::I8),
        ("torch", "ByteStorage" | "BoolStorage") => Global::Storage(Stored::U8),
        _ => {
            return Err(PickleError::refused(format!(
                "asks for Python's `{module}.{name}`. Only tensors are read, no code of a file is run: if you trust it, load it with PyTorch and save the state dict with safetensors"
            )));
        }
    })
}

/// A pickle while it is read.
#[derive(Default)]
pub(super) struct Machine {
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
}

impl Machine {
    /// Runs one pickle to its end; what is left in `input` follows it. Earlier values stay in the machine.
    pub(super) fn run(&mut self, input: &mut Input<'_>) -> Result<Id, PickleError> {
        self.stack.clear();
        self.marks.clear();
        self.memo.clear();
        for _ in 0..MAX_STEPS {
            let opcode = input.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode, input)?;
        }
        Err(PickleError::broken(format!("takes more than {MAX_STEPS} opcodes: it is no file of tensors")))
    }

    pub(super) fn value(&self, id: Id) -> &Value {
        self.values.get(id as usize).unwrap_or(&Value::Other)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        if let Value::Text(text) = self.value(id) { Some(text) } else { None }
    }

    /// Bytes an element of each storage that was referred to, by key.
    pub(super) fn storages(&self) -> BTreeMap<String, usize> {
        let of = |v: &Value| if let Value::Storage(s) = v { Some((s.key.clone(), s.stored.size())) } else { None };
        self.values.iter().filter_map(of).collect()
    }

    fn step(&mut self, opcode: u8, input: &mut Input<'_>) -> Result<(), PickleError> {
        match opcode {
            // PROTO, FRAME: nothing depends on them.
            0x80 => drop(input.byte()?),
            0x95 => drop(input.array::<8>()?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'2' => {
                let top = self.top()?;
                self.push_id(top)?;
            }
            b'N' => self.push(Value::Other)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'J' => self.push(Value::Int(i32::from_le_bytes(input.array()?).into()))?,
            b'K' => self.push(Value::Int(input.byte()?.into()))?,
            b'M' => self.push(Value::Int(u16::from_le_bytes(input.array()?).into()))?,
            0x8a => {
                let len = input.byte()?;
                let value = integer(&input.bytes(len.into())?);
                self.push(value)?;
            }
            b'G' => {
                input.array::<8>()?;
                self.push(Value::Other)?;
            }
            b'X' => {
                let len = u32::from_le_bytes(input.array()?);
                self.push_text(input.bytes(len.into())?)?;
            }
            0x8c => {
                let len = input.byte()?;
                self.push_text(input.bytes(len.into())?)?;
            }
            b')' | b']' => self.push(Value::List(Vec::new()))?,
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b't' | b'l' => {
                let items = self.since_mark()?;
                self.push(Value::List(items))?;
            }
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.insert(&items)?;
            }
            b'q' => {
                let at = input.byte()?;
                self.remember(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(input.array()?);
                self.remember(at.into())?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => {
                let at = input.byte()?;
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(input.array()?);
                self.recall(at.into())?;
            }
            b'c' => {
                let (module, name) = (input.line()?, input.line()?);
                self.push(Value::Global(global(&String::from_utf8_lossy(&module), &String::from_utf8_lossy(&name))?))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(module), Some(name)) = (self.text(module), self.text(name)) else {
                    return Err(PickleError::broken("names something of Python by what is no text"));
                };
                let found = global(module, name)?;
                self.push(Value::Global(found))?;
            }
            b'Q' => {
                let of = self.pop()?;
                let storage = self.storage(of)?;
                self.push(Value::Storage(storage))?;
            }
            b'R' => self.call()?,
            b'b' => self.set_state()?,
            // Calls of other kinds: INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1 to EXT4.
            b'i' | b'o' | 0x81 | 0x92 | 0x82..=0x84 => {
                return Err(PickleError::refused(format!(
                    "makes a Python object (opcode {opcode:#04x}). Only tensors are read: if you trust the file, load it with PyTorch and save the state dict with safetensors"
                )));
            }
            _ => {
                return Err(PickleError::broken(format!(
                    "has the opcode {opcode:#04x} at byte {}, which `torch.save` does not write: it is damaged, or no PyTorch file",
                    input.position().saturating_sub(1)
                )));
            }
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), PickleError> {
        let id = Id::try_from(self.values.len()).ok().filter(|_| self.values.len() < MAX_VALUES);
        let id = id.ok_or_else(|| PickleError::broken(format!("holds more than {MAX_VALUES} values")))?;
        self.values.push(value);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        if self.stack.len() >= MAX_VALUES {
            return Err(PickleError::broken(format!("puts more than {MAX_VALUES} values on the stack")));
        }
        self.stack.push(id);
        Ok(())
    }

    fn push_text(&mut self, bytes: Vec<u8>) -> Result<(), PickleError> {
        let text = String::from_utf8(bytes).map_err(|_| PickleError::broken("holds a text that is not UTF-8"))?;
        self.push(Value::Text(text))
    }

    fn top(&self) -> Result<Id, PickleError> {
        // What is below a mark is out of reach.
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[Id]>::last).copied().ok_or_else(empty)
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().filter(|m| *m <= self.stack.len()).ok_or_else(empty)?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, len: usize) -> Result<(), PickleError> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Value::List(items))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let list = self.top()?;
        match self.values.get_mut(list as usize) {
            Some(Value::List(of)) => of.extend(items),
            Some(_) | None => return Err(PickleError::broken("appends to what is no list")),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Id]) -> Result<(), PickleError> {
        let dict = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        match self.values.get_mut(dict as usize) {
            Some(Value::Dict(of)) if rest.is_empty() => of.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            Some(_) | None => return Err(PickleError::broken("sets items of what is no dict")),
        }
        Ok(())
    }

    fn remember(&mut self, at: u64) -> Result<(), PickleError> {
        let top = self.top()?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn recall(&mut self, at: u64) -> Result<(), PickleError> {
        let id = self.memo.get(&at).copied();
        self.push_id(id.ok_or_else(|| PickleError::broken(format!("refers to a value {at} that it does not have")))?)
    }

    /// `("storage", type, key, device, elements)`, in older files with a view of it at the end.
    fn storage(&self, of: Id) -> Result<Storage, PickleError> {
        let bad = || PickleError::broken("refers to something that is no tensor's storage");
        let Value::List(items) = self.value(of) else { return Err(bad()) };
        let (kind, class, key, len, view) = match items[..] {
            [kind, class, key, _, len] => (kind, class, key, len, None),
            [kind, class, key, _, len, view] => (kind, class, key, len, Some(view)),
            _ => return Err(bad()),
        };
        if view.is_some_and(|v| *self.value(v) != Value::Other) {
            return Err(PickleError::refused(
                "has storages that are views of others, as PyTorch before 0.4 wrote: save the model again with a newer one",
            ));
        }
        let (Some("storage"), Value::Global(Global::Storage(stored)), Some(key), Value::Int(len)) =
            (self.text(kind), self.value(class), self.text(key), self.value(len))
        else {
            return Err(bad());
        };
        let len = u64::try_from(*len).map_err(|_| bad())?;
        Ok(Storage { stored: *stored, key: key.to_owned(), len })
    }

    fn call(&mut self) -> Result<(), PickleError> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let wrong = |what: &str| PickleError::broken(format!("makes {what} of unexpected arguments"));
        let Value::List(arguments) = self.value(arguments) else { return Err(wrong("something")) };
        let Value::Global(function) = self.value(function) else {
            return Err(PickleError::refused("calls what is no function of PyTorch: only tensors are read"));
        };
        let value = match function {
            Global::OrderedDict if arguments.is_empty() => Value::Dict(Vec::new()),
            Global::OrderedDict => return Err(wrong("a dict")),
            Global::Tensor => Value::Tensor(self.view(arguments).ok_or_else(|| wrong("a tensor"))?),
            Global::Parameter => match arguments.first().map(|data| self.value(*data)) {
                Some(Value::Tensor(view)) => Value::Tensor(view.clone()),
                Some(_) | None => return Err(wrong("a parameter")),
            },
            Global::Storage(_) => {
                return Err(PickleError::refused("makes a storage by calling it: only tensors are read"));
            }
        };
        self.push(value)
    }

    /// `storage, offset, sizes, strides, …`
    fn view(&self, arguments: &[Id]) -> Option<View> {
        let [storage, offset, shape, strides, ..] = arguments else { return None };
        let (Value::Storage(storage), Value::Int(offset)) = (self.value(*storage), self.value(*offset)) else {
            return None;
        };
        let shape = self.sizes(*shape)?.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>().ok()?;
        let strides = self.sizes(*strides)?;
        let offset = u64::try_from(*offset).ok()?;
        (shape.len() == strides.len()).then(|| View { storage: storage.clone(), offset, shape, strides })
    }

    fn sizes(&self, of: Id) -> Option<Vec<u64>> {
        let Value::List(items) = self.value(of) else { return None };
        let size = |id: &Id| if let Value::Int(n) = self.value(*id) { u64::try_from(*n).ok() } else { None };
        items.iter().map(size).collect()
    }

    /// State dicts carry an attribute `_metadata`, versions of modules, which is dropped.
    fn set_state(&mut self) -> Result<(), PickleError> {
        let (state, object) = (self.pop()?, self.top()?);
        if let (Value::Dict(_), Value::Dict(state)) = (self.value(object), self.value(state))
            && state.iter().all(|(key, _)| self.text(*key) == Some("_metadata"))
        {
            Ok(())
        } else {
            Err(PickleError::refused(
                "sets attributes of an object. Only tensors are read: if you trust the file, load it with PyTorch and save the state dict with safetensors",
            ))
        }
    }
}

fn empty() -> PickleError {
    PickleError::broken("takes a value from an empty stack: it is damaged, or no PyTorch file")
}

/// A little-endian integer in two's complement; one of more than eight bytes is nothing that a tensor needs.
fn integer(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Other;
    }
    let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut all = [fill; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(all))
}
