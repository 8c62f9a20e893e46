//! The tensors of a GGUF file under the names of the original checkpoint, decoded to f32, with what the converter did
//! to the numbers undone.

use std::collections::BTreeMap;

use awqc_ir::{Elem, RawTensor, Stored, TensorError, TensorInfo, TensorSource};
use serde_json::{Map, Value as Json};

use super::blocks::GgmlType;
use super::reader::{Entry, Header};
use crate::error::ImportError;
use crate::family::gguf::{GgufSection, Undo};
use crate::file::DataFile;

/// See the module documentation.
#[derive(Debug)]
pub struct GgufSource {
    file: DataFile,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    original: String,
    entry: Entry,
    info: TensorInfo,
    undo: Vec<Fix>,
}

/// What is done to the decoded numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fix {
    /// Rows of each of this many heads go from `0, 1, 2, 3, …` to `0, 2, …, 1, 3, …`: from rotated pairs that are
    /// neighbours back to pairs that are half a head apart.
    Unpermute(usize),
    /// Plus a constant.
    Plus(f32),
    /// From rows and columns of these numbers to the shape of the tensor.
    Transpose(usize, usize),
}

impl GgufSource {
    /// Renames the tensors by the section's patterns. Tensors without a pattern keep their names. Frequency factors,
    /// which are a tensor here and configuration there, move to `config`.
    pub(crate) fn new(
        file: DataFile,
        header: Header,
        section: &GgufSection,
        config: &mut Map<String, Json>,
    ) -> Result<Self, ImportError> {
        let mut tensors = BTreeMap::new();
        for (original, entry) in header.tensors {
            if section.rope_factors.as_deref() == Some(&original) {
                rope_factors(&file, &original, &entry, config)?;
                continue;
            }
            let bad = || {
                ImportError::malformed(
                    &file.path,
                    format!("tensor `{original}` of shape {:?} is too large for this machine", entry.shape),
                )
            };
            let mut shape: Vec<usize> =
                entry.shape.iter().map(|d| usize::try_from(*d)).collect::<Result<_, _>>().map_err(|_| bad())?;
            let found = section.tensors.iter().find_map(|t| Some((t.apply(&original)?, &t.undo)));
            let (name, undo) = match found {
                Some((name, undo)) => (name, fixes(&file, &original, &shape, undo, config)?),
                None => (original.clone(), Vec::new()),
            };
            if undo.iter().any(|f| matches!(f, Fix::Transpose(..))) {
                shape.reverse();
            }
            let info = TensorInfo { stored: Stored::F32, shape };
            if let Some(other) = tensors.insert(name.clone(), Place { original: original.clone(), entry, info, undo }) {
                let problem = format!("tensors `{}` and `{original}` both stand for `{name}`", other.original);
                return Err(ImportError::malformed(&file.path, problem));
            }
        }
        Ok(Self { file, tensors })
    }
}

fn fixes(
    file: &DataFile,
    tensor: &str,
    shape: &[usize],
    undo: &[Undo],
    config: &Map<String, Json>,
) -> Result<Vec<Fix>, ImportError> {
    let mut out = Vec::new();
    for step in undo {
        out.push(match step {
            Undo::Plus(c) => Fix::Plus(*c),
            Undo::Transpose => match *shape {
                [rows, cols] => Fix::Transpose(rows, cols),
                _ => {
                    return Err(ImportError::malformed(
                        &file.path,
                        format!("tensor `{tensor}` of shape {shape:?} must be a matrix"),
                    ));
                }
            },
            Undo::Unpermute(key) => {
                let heads = config.get(key).and_then(Json::as_u64).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
                let rows = shape.first().copied().unwrap_or(0);
                if heads == 0 || heads.checked_mul(2).is_none_or(|n| rows % n != 0) {
                    return Err(ImportError::config(
                        &file.path,
                        key,
                        format!(
                            "is {heads}; it must divide the {rows} rows of tensor `{tensor}` into heads of even size"
                        ),
                    ));
                }
                Fix::Unpermute(heads)
            }
        });
    }
    Ok(out)
}

/// Frequency divisors stored as a tensor are the `longrope` configuration with equal short and long factors.
fn rope_factors(file: &DataFile, name: &str, entry: &Entry, config: &mut Map<String, Json>) -> Result<(), ImportError> {
    let bytes = file.read(entry.at, entry.len).map_err(|e| ImportError::io(&file.path, e))?;
    let factors = entry.ty.decode(&bytes);
    if factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
        return Err(ImportError::malformed(
            &file.path,
            format!("tensor `{name}` must hold positive frequency divisors"),
        ));
    }
    let factors: Vec<Json> = factors.into_iter().map(|f| super::config::shortest(f).into()).collect();
    config.insert(
        "rope_scaling".into(),
        serde_json::json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}),
    );
    Ok(())
}

impl GgufSource {
    /// The float type that holds most of the file's numbers: blocks of quantized numbers have half-precision scales, so
    /// f16 does for them.
    pub(crate) fn elem(&self) -> Elem {
        let mut counts = [(Elem::F16, 0u128), (Elem::Bf16, 0), (Elem::F32, 0)];
        for place in self.tensors.values() {
            let at = match place.entry.ty {
                GgmlType::F32 => 2,
                GgmlType::Bf16 => 1,
                GgmlType::F16
                | GgmlType::Q4_0
                | GgmlType::Q4_1
                | GgmlType::Q5_0
                | GgmlType::Q5_1
                | GgmlType::Q8_0
                | GgmlType::Q4K
                | GgmlType::Q5K
                | GgmlType::Q6K => 0,
            };
            counts[at].1 += place.info.shape.iter().fold(1u128, |n, d| n.saturating_mul(*d as u128));
        }
        counts.into_iter().max_by_key(|(_, n)| *n).map_or(Elem::F16, |(elem, _)| elem)
    }
}

impl TensorSource for GgufSource {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|t| t.info.clone())
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let place = self
            .tensors
            .get(name)
            .ok_or_else(|| TensorError(format!("there is no tensor `{name}` in the checkpoint")))?;
        let Entry { ty, at, len, .. } = place.entry;
        let bytes = self.file.read(at, len).map_err(|e| {
            let path = self.file.path.display();
            TensorError(format!(
                "cannot read tensor `{}` ({name}) in {path}: {e}; was the file changed?",
                place.original
            ))
        })?;
        let mut values = ty.decode(&bytes);
        drop(bytes);
        for fix in &place.undo {
            match fix {
                Fix::Plus(c) => values.iter_mut().for_each(|v| *v += c),
                Fix::Transpose(rows, cols) => values = transpose(&values, *rows, *cols),
                Fix::Unpermute(heads) => {
                    values = unpermute(&values, place.info.shape.first().copied().unwrap_or(1), *heads)
                }
            }
        }
        Ok(RawTensor { info: place.info.clone(), bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() })
    }
}

fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let at = |i: usize| values.get((i % rows) * cols + i / rows).copied().unwrap_or(0.0);
    (0..rows * cols).map(at).collect()
}

/// Row `h·D + r·D/2 + j` of the answer is row `h·D + 2j + r` of `values`, with `D` rows a head.
fn unpermute(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (cols, per) = (values.len() / rows.max(1), rows / heads.max(1));
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for half in 0..2 {
            for j in 0..per / 2 {
                let row = head * per + 2 * j + half;
                out.extend_from_slice(values.get(row * cols..(row + 1) * cols).unwrap_or(&[]));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transpose_exchanges_axes() {
        assert_eq!(transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn unpermute_reverses_the_converter() {
        // The converter views each head's rows as [2, D/2] and exchanges these axes.
        let (heads, per, cols) = (3, 8, 2);
        let original: Vec<f32> = (0..heads * per * cols).map(|i| i as f32).collect();
        let mut converted = Vec::new();
        for h in 0..heads {
            for j in 0..per / 2 {
                for half in 0..2 {
                    let row = h * per + half * per / 2 + j;
                    converted.extend_from_slice(&original[row * cols..(row + 1) * cols]);
                }
            }
        }
        assert_ne!(converted, original);
        assert_eq!(unpermute(&converted, heads * per, heads), original);
    }
}
