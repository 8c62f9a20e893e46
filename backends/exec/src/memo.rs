//! A tensor source that remembers what the current region has read: passes realize the same weights many times, and
//! decoding a compressed checkpoint costs more than the arithmetic on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use awqc_ir::{RawTensor, RegionName, TensorError, TensorInfo, TensorSource};

/// Larger tensors (embedding tables) are read once a region anyway.
const LARGEST: usize = 1 << 26;

pub(crate) struct Memo {
    inner: Arc<dyn TensorSource>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    region: Option<RegionName>,
    tensors: BTreeMap<String, Arc<[f32]>>,
}

impl Memo {
    pub(crate) fn new(inner: Arc<dyn TensorSource>) -> Self {
        Self { inner, state: Mutex::default() }
    }

    /// Forgets the tensors of other regions.
    pub(crate) fn enter(&self, region: &RegionName) {
        let mut state = self.lock();
        if state.region.as_ref() != Some(region) {
            *state = State { region: Some(region.clone()), tensors: BTreeMap::new() };
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // What a panicking thread left is still a map of whole tensors.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TensorSource for Memo {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(name)
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        self.inner.read(name)
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, TensorError> {
        if let Some(known) = self.lock().tensors.get(name) {
            return Ok(known.to_vec());
        }
        let data = self.inner.read_f32(name)?;
        if data.len() <= LARGEST {
            self.lock().tensors.insert(name.to_owned(), data.as_slice().into());
        }
        Ok(data)
    }
}
