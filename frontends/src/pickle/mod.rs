//! State dicts as `torch.save` writes them: `pytorch_model.bin`, its shards, `.pt` and `.pth` files, in the zip form of
//! PyTorch 1.6 and the form before it.
//!
//! A pickle is a program. This one is never run: [`machine`] understands the few opcodes and the few Python names that
//! tensors need, and a file that asks for anything else is refused by the name that it asks for. Of a file, only the
//! pickle is kept in memory; tensors are read one at a time at their position.

mod input;
mod machine;
mod zip;

use std::collections::BTreeMap;
use std::path::Path;

use awqc_ir::TensorInfo;

use crate::error::ImportError;
use crate::file::DataFile;
use crate::shards::{Format, Shards};
use input::Input;
use machine::{Id, Machine, Value, View};
use zip::Entry;

/// The index of a sharded checkpoint.
pub const INDEX: &str = "pytorch_model.bin.index.json";

/// What such files end in.
pub const EXTENSIONS: [&str; 3] = ["bin", "pt", "pth"];

/// How the form before zip archives begins: a pickle of the number 0x1950a86a20f9469cfc6c.
const OLD: [u8; 15] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// Keys under which training scripts put the state dict.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// Why a pickled file cannot be read.
#[derive(Debug)]
enum PickleError {
    Io(std::io::Error),
    /// It does not follow its own format.
    Broken(String),
    /// It holds, or wants, something else than tensors.
    Refused(String),
}

impl PickleError {
    fn broken(problem: impl Into<String>) -> Self {
        PickleError::Broken(problem.into())
    }

    fn refused(problem: impl Into<String>) -> Self {
        PickleError::Refused(problem.into())
    }

    fn short() -> Self {
        PickleError::broken("ends too early: the file is incomplete; download it again")
    }

    fn of(self, path: &Path) -> ImportError {
        match self {
            PickleError::Io(e) => ImportError::io(path, e),
            PickleError::Broken(problem) => ImportError::malformed(path, problem),
            PickleError::Refused(problem) => ImportError::unsupported(path, problem),
        }
    }
}

/// The format.
#[derive(Debug)]
pub enum PickleFormat {}

/// Tensors of one or more pickled files.
pub type Pickled = Shards<PickleFormat>;

/// A tensor in its file. Every element lies inside of its storage.
#[derive(Debug)]
pub struct Place {
    /// Where its first element is.
    at: u64,
    /// Bytes from there to the end of its last element.
    span: u64,
    info: TensorInfo,
    /// Elements between neighbours of each axis; `None` where they follow one another.
    strides: Option<Vec<usize>>,
}

impl Format for PickleFormat {
    type Place = Place;

    fn entries(file: &DataFile) -> Result<Vec<(String, Place)>, ImportError> {
        read(file).map_err(|e| e.of(&file.path))
    }

    fn info(place: &Place) -> &TensorInfo {
        &place.info
    }

    fn read(file: &DataFile, place: &Place) -> Result<Vec<u8>, std::io::Error> {
        let bytes = file.read(place.at, place.span)?;
        Ok(match &place.strides {
            None => bytes,
            Some(strides) => gather(&bytes, &place.info, strides),
        })
    }
}

/// The elements of a strided view, row-major.
fn gather(bytes: &[u8], info: &TensorInfo, strides: &[usize]) -> Vec<u8> {
    let size = info.stored.size();
    let mut out = Vec::with_capacity(info.shape.iter().product::<usize>() * size);
    let mut index = vec![0; info.shape.len()];
    let mut at = 0;
    loop {
        out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        // The next index, the last axis first; what an axis went forward it goes back when it is through.
        let mut axis = info.shape.len();
        loop {
            if axis == 0 {
                return out;
            }
            axis -= 1;
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < info.shape[axis] {
                break;
            }
            at -= strides[axis] * info.shape[axis];
            index[axis] = 0;
        }
    }
}

/// The tensors of one file.
fn read(file: &DataFile) -> Result<Vec<(String, Place)>, PickleError> {
    let head = file.read(0, file.len.min(262)).map_err(PickleError::Io)?;
    let mut machine = Machine::default();
    let (root, storages) = if head.starts_with(b"PK") {
        of_zip(file, &mut machine)?
    } else if head.starts_with(&OLD) {
        of_old(file, &mut machine)?
    } else if head.get(257..262) == Some(b"ustar") {
        return Err(PickleError::refused(
            "is a tar archive, the form of PyTorch before 0.1.10: load it with PyTorch and save it again",
        ));
    } else {
        return Err(PickleError::refused("is no file of `torch.save`: give one, or a folder with safetensors"));
    };
    let dict = state_dict(&machine, root)?;
    let distributed = !dict.is_empty() && dict.keys().all(|name| name.starts_with("module."));
    let prefix = if distributed { "module.".len() } else { 0 };
    dict.into_iter().map(|(name, view)| Ok((name[prefix..].to_owned(), place(name, view, &storages)?))).collect()
}

/// The zip form: `NAME/data.pkl`, and each storage as `NAME/data/KEY`.
fn of_zip(file: &DataFile, machine: &mut Machine) -> Result<(Id, BTreeMap<String, Entry>), PickleError> {
    let entries = zip::entries(file)?;
    let main = entries.iter().find_map(|(name, entry)| Some((name.strip_suffix("/data.pkl")?, *entry)));
    let Some((folder, main)) = main else {
        return Err(PickleError::refused("is a zip archive without data.pkl: it was not written by `torch.save`"));
    };
    if entries.contains_key(&format!("{folder}/constants.pkl")) {
        return Err(PickleError::refused(
            "is a TorchScript program; no code of a file is run: save the state dict of the model instead",
        ));
    }
    if let Some(order) = entries.get(&format!("{folder}/byteorder")) {
        let order = file.read(order.at, order.len.min(16)).map_err(PickleError::Io)?;
        if order != b"little" {
            return Err(PickleError::refused("was saved on a big-endian machine: save it again on another"));
        }
    }
    let root = machine.run(&mut Input::new(file, main.at, main.at + main.len))?;
    let data = format!("{folder}/data/");
    let storages = entries.into_iter().filter_map(|(name, entry)| Some((name.strip_prefix(&data)?.to_owned(), entry)));
    Ok((root, storages.collect()))
}

/// The form before: five pickles (a number, a version, the system, the value, the keys of storages), then for each key
/// the count of its elements and its bytes.
fn of_old(file: &DataFile, machine: &mut Machine) -> Result<(Id, BTreeMap<String, Entry>), PickleError> {
    let mut input = Input::new(file, 0, file.len);
    for _ in 0..2 {
        machine.run(&mut input)?;
    }
    let system = machine.run(&mut input)?;
    if let Value::Dict(system) = machine.value(system)
        && system.iter().any(|(key, value)| {
            machine.text(*key) == Some("little_endian") && *machine.value(*value) == Value::Bool(false)
        })
    {
        return Err(PickleError::refused("was saved on a big-endian machine: save it again on another"));
    }
    let root = machine.run(&mut input)?;
    let sizes = machine.storages();
    let keys = machine.run(&mut input)?;
    let Value::List(keys) = machine.value(keys) else {
        return Err(PickleError::broken("has no list of storages"));
    };
    let mut at = input.position();
    let mut storages = BTreeMap::new();
    for key in keys {
        let size = machine.text(*key).and_then(|key| Some((key, sizes.get(key)?)));
        let (key, size) = size.ok_or_else(|| PickleError::broken("lists a storage that no tensor uses"))?;
        let count = file.read(at, 8).map_err(|_| PickleError::short())?;
        let count = count.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let len = count.checked_mul(*size as u64).ok_or_else(PickleError::short)?;
        storages.insert(key.to_owned(), Entry { at: at + 8, len });
        at = (at + 8).checked_add(len).filter(|end| *end <= file.len).ok_or_else(PickleError::short)?;
    }
    Ok((root, storages))
}

/// The tensors of the value, by name: of itself, or of the state dict that a training script put in it. What is no
/// tensor is left out.
fn state_dict(machine: &Machine, root: Id) -> Result<BTreeMap<String, View>, PickleError> {
    let mut at = root;
    // As deep as scripts nest; a dict may hold itself.
    for _ in 0..4 {
        let Value::Dict(items) = machine.value(at) else { break };
        let named = items.iter().filter_map(|(key, value)| Some((machine.text(*key)?, *value)));
        let tensors: BTreeMap<String, View> = named
            .clone()
            .filter_map(|(name, value)| match machine.value(value) {
                Value::Tensor(view) => Some((name.to_owned(), view.clone())),
                Value::Other
                | Value::Bool(_)
                | Value::Int(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Dict(_)
                | Value::Global(_)
                | Value::Storage(_) => None,
            })
            .collect();
        if !tensors.is_empty() {
            return Ok(tensors);
        }
        let inner = WRAPPERS.iter().find_map(|w| named.clone().rfind(|(name, _)| name == w));
        match inner {
            Some((_, value)) => at = value,
            None => break,
        }
    }
    Err(PickleError::refused(format!(
        "holds no dict of tensors, neither itself nor under {}: save `model.state_dict()`",
        WRAPPERS.join(", ")
    )))
}

fn place(name: String, view: View, storages: &BTreeMap<String, Entry>) -> Result<Place, PickleError> {
    let View { storage, offset, shape, strides } = view;
    let entry = storages.get(&storage.key).ok_or_else(|| {
        PickleError::broken(format!("has no storage `{}`, which tensor `{name}` needs: download it again", storage.key))
    })?;
    let size = storage.stored.size() as u64;
    if storage.len.checked_mul(size).is_none_or(|bytes| bytes > entry.len) {
        return Err(PickleError::broken(format!(
            "has {} bytes for the {} numbers ({}) of tensor `{name}`: download it again",
            entry.len, storage.len, storage.stored
        )));
    }
    let outside = || PickleError::broken(format!("has tensor `{name}` reach beyond its storage"));
    let count = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64)).ok_or_else(outside)?;
    let info = TensorInfo { stored: storage.stored, shape };
    if count == 0 {
        return Ok(Place { at: entry.at, span: 0, info, strides: None });
    }
    if count > storage.len {
        return Err(PickleError::refused(format!(
            "has tensor `{name}` as an expanded view, more numbers than are stored: save `{name}.contiguous()`"
        )));
    }
    let axes = || info.shape.iter().map(|d| *d as u64).zip(&strides);
    let last = axes().try_fold(0u64, |last, (d, stride)| last.checked_add((d - 1).checked_mul(*stride)?));
    let last = last.and_then(|last| last.checked_add(offset)).filter(|last| *last < storage.len).ok_or_else(outside)?;
    // An axis of one element may have any stride.
    let mut step = 1;
    let mut dense = true;
    for (d, stride) in axes().rev() {
        dense &= d == 1 || *stride == step;
        step *= d;
    }
    let strides = strides.iter().zip(&info.shape).map(|(s, d)| if *d == 1 { Ok(0) } else { usize::try_from(*s) });
    let strides = strides.collect::<Result<Vec<_>, _>>().map_err(|_| outside())?;
    Ok(Place {
        at: entry.at + offset * size,
        span: (last + 1 - offset) * size,
        info,
        strides: (!dense).then_some(strides),
    })
}
