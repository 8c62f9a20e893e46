//! What calibration does in one way on the host and in another on a device: how windows follow each other, and where
//! sums over tokens are made.

use std::ops::Range;

use awqc_passes::{ExecError, InputStats};
use burn_backend::Backend;
use burn_backend::tensor::FloatTensor;
use rayon::prelude::*;

use crate::gram::Accumulator;
use crate::host::math::all_finite;
use crate::host::{Host, floats};
use crate::interp::ExecBackend;

/// A burn backend that can calibrate.
pub trait Calibrate: ExecBackend {
    /// Statistics of one value under construction.
    type Sums: Sums<Self> + Send;

    /// What `run` makes of each window, in order.
    ///
    /// # Errors
    /// Those of `run`.
    fn each<T: Send, R: Send>(
        windows: Vec<T>,
        run: impl Fn(T) -> Result<R, ExecError> + Send + Sync,
    ) -> Result<Vec<R>, ExecError>;

    /// Whether the tensors hold neither NaN nor infinity.
    ///
    /// # Errors
    /// When the device cannot be read.
    fn all_finite(tensors: &[&FloatTensor<Self>]) -> Result<bool, ExecError>;
}

/// Rows of a tensor `[…,C]`, counted over all axes but the last.
#[derive(Clone)]
pub struct Rows<'a, B: Backend> {
    /// The tensor.
    pub of: &'a FloatTensor<B>,
    /// Which of its rows.
    pub range: Range<usize>,
}

/// Sums over rows.
pub trait Sums<B: Backend>: Sized {
    /// None yet; for rows of `channels`, sampling about `samples` of `tokens` rows.
    fn new(channels: usize, tokens: u64, samples: usize) -> Self;

    /// Adds blocks of rows.
    ///
    /// # Errors
    /// When the device fails.
    fn add(&mut self, blocks: &[Rows<'_, B>]) -> Result<(), ExecError>;

    /// The statistics.
    ///
    /// # Errors
    /// When the device cannot be read.
    fn finish(self) -> Result<InputStats, ExecError>;
}

impl Calibrate for Host {
    type Sums = Accumulator;

    /// Windows run side by side.
    fn each<T: Send, R: Send>(
        windows: Vec<T>,
        run: impl Fn(T) -> Result<R, ExecError> + Send + Sync,
    ) -> Result<Vec<R>, ExecError> {
        windows.into_par_iter().map(run).collect()
    }

    fn all_finite(tensors: &[&FloatTensor<Self>]) -> Result<bool, ExecError> {
        Ok(tensors.iter().all(|t| all_finite(&floats(t))))
    }
}

impl Sums<Host> for Accumulator {
    fn new(channels: usize, tokens: u64, samples: usize) -> Self {
        Self::new(channels, tokens, samples)
    }

    fn add(&mut self, blocks: &[Rows<'_, Host>]) -> Result<(), ExecError> {
        let width = self.channels();
        let numbers: Vec<_> = blocks.iter().map(|rows| floats(rows.of)).collect();
        let ranges = blocks.iter().map(|rows| rows.range.start * width..rows.range.end * width);
        let parts: Vec<&[f32]> = numbers.iter().zip(ranges).filter_map(|(all, range)| all.get(range)).collect();
        self.add(&parts);
        Ok(())
    }

    fn finish(self) -> Result<InputStats, ExecError> {
        Ok(self.finish())
    }
}
