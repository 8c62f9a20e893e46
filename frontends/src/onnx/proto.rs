//! The messages of an ONNX file that matter, read from protobuf's wire format. Tensors stay in the file: what is read
//! is where their bytes lie. Nothing is allocated that the file could not hold.

use std::collections::BTreeMap;
use std::path::Path;

use awqc_ir::{Stored, TensorInfo};

use super::wire::{Field, Wire};
use crate::error::ImportError;
use crate::file::DataFile;

/// A model: its graph and the versions of the op sets that it uses.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) nodes: Vec<Node>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
}

/// One application of an op.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) op: String,
    /// Empty for one that is left out.
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
    pub(super) attributes: BTreeMap<String, Attribute>,
}

/// An attribute's value.
#[derive(Clone, Debug)]
pub(super) enum Attribute {
    Int(i64),
    Float(f32),
    Text(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Tensor(Tensor),
    /// A kind that no op here takes: graphs, lists of texts or tensors.
    Other,
}

/// What an element of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    F64,
    I32,
    I64,
    Bool,
}

impl Kind {
    pub(super) fn of(code: i64) -> Option<Self> {
        Some(match code {
            1 => Kind::F32,
            6 => Kind::I32,
            7 => Kind::I64,
            9 => Kind::Bool,
            10 => Kind::F16,
            11 => Kind::F64,
            16 => Kind::Bf16,
            _other => return None,
        })
    }

    pub(super) fn is_float(self) -> bool {
        match self {
            Kind::F32 | Kind::F16 | Kind::Bf16 | Kind::F64 => true,
            Kind::I32 | Kind::I64 | Kind::Bool => false,
        }
    }

    pub(super) fn stored(self) -> Stored {
        match self {
            Kind::F32 => Stored::F32,
            Kind::F16 => Stored::F16,
            Kind::Bf16 => Stored::Bf16,
            Kind::F64 => Stored::F64,
            Kind::I32 => Stored::I32,
            Kind::I64 => Stored::I64,
            Kind::Bool => Stored::U8,
        }
    }
}

/// Where a tensor's numbers are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Place {
    /// In the model's file.
    Here { at: u64, len: u64 },
    /// In another file beside it; without `len`, up to what the shape needs.
    Beside { file: String, at: u64, len: Option<u64> },
    /// Written number by number: little-endian bytes.
    Bytes(Vec<u8>),
}

/// A tensor whose numbers are still in the file.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    pub(super) place: Place,
}

impl Tensor {
    pub(super) fn info(&self) -> TensorInfo {
        TensorInfo { stored: self.kind.stored(), shape: self.shape.clone() }
    }

    /// Bytes that the shape needs; `None` if they cannot be counted.
    pub(super) fn size(&self) -> Option<u64> {
        let count = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        u64::try_from(count.checked_mul(self.kind.stored().size())?).ok()
    }
}

/// Reads the head of a file: everything but the numbers of its tensors.
pub(super) fn read(file: &DataFile) -> Result<Graph, ImportError> {
    Reader { file }.model()
}

struct Reader<'f> {
    file: &'f DataFile,
}

impl<'f> Reader<'f> {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn bad(&self, problem: impl std::fmt::Display) -> ImportError {
        ImportError::malformed(self.path(), format!("{problem}: this is no ONNX model, or it was cut short"))
    }

    fn text(&self, field: &Field) -> Result<String, ImportError> {
        let (at, len) = field.span().map_err(|e| self.bad(e))?;
        let bytes = self.file.read(at, len).map_err(|e| ImportError::io(self.path(), e))?;
        String::from_utf8(bytes).map_err(|_| self.bad(format!("the text at byte {at} is not UTF-8")))
    }

    fn message(&self, field: &Field) -> Result<Wire<'f>, ImportError> {
        let (at, len) = field.span().map_err(|e| self.bad(e))?;
        Ok(Wire::new(self.file, at, len))
    }

    fn next(&self, wire: &mut Wire<'_>) -> Result<Option<(u64, Field)>, ImportError> {
        wire.next().map_err(|e| self.bad(e))
    }

    fn model(&self) -> Result<Graph, ImportError> {
        let mut wire = Wire::new(self.file, 0, self.file.len);
        let mut graph = None;
        while let Some((number, field)) = self.next(&mut wire)? {
            match number {
                7 if graph.is_none() => graph = Some(self.graph(self.message(&field)?)?),
                25 => {
                    return Err(ImportError::unsupported(
                        self.path(),
                        "has functions of its own; inline them first (onnx.inliner.inline_local_functions)",
                    ));
                }
                _other => {}
            }
        }
        graph.ok_or_else(|| self.bad("there is no graph in it"))
    }

    fn graph(&self, mut wire: Wire<'_>) -> Result<Graph, ImportError> {
        let mut graph = Graph::default();
        while let Some((number, field)) = self.next(&mut wire)? {
            match number {
                1 => graph.nodes.push(self.node(self.message(&field)?)?),
                5 => {
                    let (name, tensor) = self.tensor(self.message(&field)?)?;
                    graph.tensors.insert(name, tensor);
                }
                11 => graph.inputs.push(self.first_text(self.message(&field)?)?),
                12 => graph.outputs.push(self.first_text(self.message(&field)?)?),
                15 => {
                    return Err(ImportError::unsupported(self.path(), "has sparse tensors; export it with dense ones"));
                }
                _other => {}
            }
        }
        graph.inputs.retain(|name| !graph.tensors.contains_key(name));
        Ok(graph)
    }

    /// Field 1 of a message, a text.
    fn first_text(&self, mut wire: Wire<'_>) -> Result<String, ImportError> {
        let mut name = String::new();
        while let Some((number, field)) = self.next(&mut wire)? {
            if number == 1 {
                name = self.text(&field)?;
            }
        }
        Ok(name)
    }

    fn node(&self, mut wire: Wire<'_>) -> Result<Node, ImportError> {
        let mut node = Node::default();
        while let Some((number, field)) = self.next(&mut wire)? {
            match number {
                1 => node.inputs.push(self.text(&field)?),
                2 => node.outputs.push(self.text(&field)?),
                3 => node.name = self.text(&field)?,
                4 => node.op = self.text(&field)?,
                5 => {
                    let (name, value) = self.attribute(self.message(&field)?)?;
                    node.attributes.insert(name, value);
                }
                _other => {}
            }
        }
        Ok(node)
    }

    fn attribute(&self, mut wire: Wire<'_>) -> Result<(String, Attribute), ImportError> {
        let (mut name, mut value) = (String::new(), Attribute::Other);
        let (mut ints, mut floats) = (Vec::new(), Vec::new());
        let mut declared = None;
        while let Some((number, field)) = self.next(&mut wire)? {
            match (number, &field) {
                (1, _) => name = self.text(&field)?,
                (2, Field::Fixed32(bits)) => value = Attribute::Float(f32::from_bits(*bits)),
                (3, Field::Varint(n)) => value = Attribute::Int(*n as i64),
                (4, _) => value = self.text(&field).map_or(Attribute::Other, Attribute::Text),
                (5, _) => value = Attribute::Tensor(self.tensor(self.message(&field)?)?.1),
                (7, Field::Fixed32(bits)) => floats.push(f32::from_bits(*bits)),
                (7, Field::Span { .. }) => {
                    let (at, len) = field.span().map_err(|e| self.bad(e))?;
                    let bytes = self.file.read(at, len).map_err(|e| ImportError::io(self.path(), e))?;
                    floats.extend(bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)));
                }
                (8, _) => self.varints(&field, &mut ints)?,
                (20, Field::Varint(n)) => declared = Some(*n),
                _other => {}
            }
        }
        // A list without entries is only known by its declared type.
        Ok(match (declared, ints.is_empty(), floats.is_empty()) {
            (Some(7), _, _) | (_, false, _) => (name, Attribute::Ints(ints)),
            (Some(6), _, _) | (_, _, false) => (name, Attribute::Floats(floats)),
            // A zero is not written.
            (Some(2), ..) if matches!(value, Attribute::Other) => (name, Attribute::Int(0)),
            (Some(1), ..) if matches!(value, Attribute::Other) => (name, Attribute::Float(0.0)),
            _value => (name, value),
        })
    }

    /// Integers, packed or one at a time.
    fn varints(&self, field: &Field, out: &mut Vec<i64>) -> Result<(), ImportError> {
        match field {
            Field::Varint(n) => out.push(*n as i64),
            Field::Fixed32(_) | Field::Fixed64(_) => return Err(self.bad("a list of integers has another form")),
            Field::Span { .. } => {
                let mut wire = self.message(field)?;
                while let Some(n) = wire.varint().map_err(|e| self.bad(e))? {
                    out.push(n as i64);
                }
            }
        }
        Ok(())
    }

    fn tensor(&self, mut wire: Wire<'_>) -> Result<(String, Tensor), ImportError> {
        let (mut name, mut dims, mut code) = (String::new(), Vec::new(), 0);
        let (mut small, mut large, mut place) = (Vec::new(), Vec::new(), None);
        let mut loose: Vec<u8> = Vec::new();
        let mut external: BTreeMap<String, String> = BTreeMap::new();
        while let Some((number, field)) = self.next(&mut wire)? {
            match (number, &field) {
                (1, _) => self.varints(&field, &mut dims)?,
                (2, Field::Varint(n)) => code = *n as i64,
                (3, _) => return Err(ImportError::unsupported(self.path(), "has tensors in segments")),
                (5, _) => self.varints(&field, &mut small)?,
                (7, _) => self.varints(&field, &mut large)?,
                (8, _) => name = self.text(&field)?,
                (4 | 10, Field::Fixed32(bits)) => loose.extend(bits.to_le_bytes()),
                (4 | 10, Field::Fixed64(bits)) => loose.extend(bits.to_le_bytes()),
                (4 | 9 | 10, Field::Span { at, len }) => place = Some(Place::Here { at: *at, len: *len }),
                (13, _) => {
                    let mut entry = [String::new(), String::new()];
                    let mut wire = self.message(&field)?;
                    while let Some((number, field)) = self.next(&mut wire)? {
                        if let Some(slot) = number.checked_sub(1).and_then(|i| entry.get_mut(i as usize)) {
                            *slot = self.text(&field)?;
                        }
                    }
                    let [key, value] = entry;
                    external.insert(key, value);
                }
                _other => {}
            }
        }
        let kind = Kind::of(code).ok_or_else(|| {
            ImportError::unsupported(
                self.path(),
                format!("tensor `{name}` has element type {code}; floats, int32, int64 and bool are understood"),
            )
        })?;
        let dims: Result<Vec<usize>, _> = dims.into_iter().map(usize::try_from).collect();
        let shape = dims.map_err(|_| self.bad(format!("tensor `{name}` has a negative axis")))?;
        if shape.iter().any(|d| *d > 1 << 31) || (kind.is_float() && shape.contains(&0)) {
            return Err(self.bad(format!("tensor `{name}` has the shape {shape:?}")));
        }
        let place = match (external.get("location"), place) {
            (Some(location), _) => {
                let number = |key: &str| -> Result<Option<u64>, ImportError> {
                    let parse = |v: &String| v.parse().map_err(|_| self.bad(format!("`{key}` of `{name}` is {v:?}")));
                    external.get(key).map(parse).transpose()
                };
                Place::Beside { file: location.clone(), at: number("offset")?.unwrap_or(0), len: number("length")? }
            }
            (None, Some(place)) => place,
            (None, None) if !loose.is_empty() => Place::Bytes(loose),
            (None, None) => Place::Bytes(written(kind, &small, &large)),
        };
        let tensor = Tensor { shape, kind, place };
        let have = match &tensor.place {
            Place::Here { len, .. } => Some(*len),
            Place::Bytes(bytes) => Some(bytes.len() as u64),
            Place::Beside { len, .. } => *len,
        };
        let need = tensor.size().ok_or_else(|| self.bad(format!("tensor `{name}` is too large")))?;
        match have {
            Some(have) if have != need => {
                Err(self
                    .bad(format!("tensor `{name}` of shape {:?} has {have} bytes, {need} are needed", tensor.shape)))
            }
            Some(_) | None => Ok((name, tensor)),
        }
    }
}

/// Numbers that are written as integers, in their own form.
fn written(kind: Kind, small: &[i64], large: &[i64]) -> Vec<u8> {
    match kind {
        Kind::I64 => large.iter().flat_map(|n| n.to_le_bytes()).collect(),
        Kind::I32 => small.iter().flat_map(|n| (*n as i32).to_le_bytes()).collect(),
        Kind::Bool => small.iter().map(|n| u8::from(*n != 0)).collect(),
        Kind::F16 | Kind::Bf16 => small.iter().flat_map(|n| (*n as u16).to_le_bytes()).collect(),
        Kind::F32 | Kind::F64 => Vec::new(),
    }
}
