//! From text to token windows, and back: the model's own tokenizer, by the `tokenizers` crate.

use std::path::Path;

use safetensors::SafeTensors;
use tokenizers::Tokenizer as Hf;

use crate::failure::{Exit, Failure};

/// A model's tokenizer.
pub struct Tokenizer {
    inner: Hf,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is not one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Failure> {
        let inner = Hf::from_bytes(bytes)
            .map_err(|e| Failure::new(Exit::BadInput, format!("tokenizer.json cannot be read: {e}")))?;
        Ok(Self { inner })
    }

    /// The ids of a text, without special tokens of the tokenizer's own.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, Failure> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Failure::new(Exit::BadInput, format!("the text cannot be tokenized: {e}")))?;
        encoding
            .get_ids()
            .iter()
            .map(|id| {
                i32::try_from(*id).map_err(|_| Failure::new(Exit::BadInput, format!("token id {id} is too large")))
            })
            .collect()
    }

    /// The text of ids, special tokens left out.
    ///
    /// # Errors
    /// When an id is unknown.
    pub fn decode(&self, ids: &[i32]) -> Result<String, Failure> {
        let ids: Vec<u32> = ids.iter().map(|id| id.unsigned_abs()).collect();
        self.inner
            .decode(&ids, true)
            .map_err(|e| Failure::new(Exit::Failed, format!("the tokens cannot be decoded: {e}")))
    }

    /// The id of a special token.
    pub fn id(&self, token: &str) -> Option<i32> {
        self.inner.token_to_id(token).and_then(|id| i32::try_from(id).ok())
    }
}

/// Cuts ids into at most `limit` consecutive windows of `context`; the rest is dropped.
///
/// # Errors
/// When there is not even one window.
pub fn windows(ids: &[i32], context: usize, limit: usize, what: &str) -> Result<Vec<Vec<i32>>, Failure> {
    let windows: Vec<Vec<i32>> = ids.chunks_exact(context.max(1)).take(limit).map(<[i32]>::to_vec).collect();
    if windows.is_empty() {
        return Err(Failure::new(
            Exit::BadInput,
            format!("{what} holds {} tokens, one window needs {context}", ids.len()),
        )
        .help("give a longer text or a smaller window"));
    }
    Ok(windows)
}

/// Reads `input_ids`, integers `[n, len]`, from a safetensors file.
///
/// # Errors
/// When the file holds no such tensor.
pub fn read_ids(path: &Path) -> Result<Vec<Vec<i32>>, Failure> {
    let bad = |why: String| {
        Failure::new(Exit::BadInput, format!("{}: {why}", path.display()))
            .help("the file must hold `input_ids`, i64 or i32, [windows, length]")
    };
    let bytes = std::fs::read(path).map_err(|e| Failure::io(path, &e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("not a safetensors file: {e}")))?;
    let ids = file.tensor("input_ids").map_err(|_| bad("no tensor `input_ids`".into()))?;
    let &[n, len] = ids.shape() else { return Err(bad(format!("`input_ids` has shape {:?}", ids.shape()))) };
    let flat: Option<Vec<i32>> = match ids.dtype() {
        safetensors::Dtype::I64 => {
            ids.data().as_chunks::<8>().0.iter().map(|b| i32::try_from(i64::from_le_bytes(*b)).ok()).collect()
        }
        safetensors::Dtype::I32 => Some(ids.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()),
        other => return Err(bad(format!("`input_ids` is {other:?}"))),
    };
    let flat = flat.ok_or_else(|| bad("an id does not fit 32 bits".into()))?;
    if n == 0 || len < 2 {
        return Err(bad(format!("`input_ids` is [{n}, {len}]: at least one window of two tokens is needed")));
    }
    Ok(flat.chunks_exact(len).map(<[i32]>::to_vec).collect())
}
