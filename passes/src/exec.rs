//! The executor port: what a pass may ask of the outside world. Back ends implement it; passes never name one.

use awqc_ir::{FusedDef, Region, ValueId, WeightId};

use crate::facts::InputStats;

/// A dense row-major f32 tensor on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensor {
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// `shape.product()` numbers.
    pub data: Vec<f32>,
}

impl Tensor {
    /// A tensor of `shape` over `data`.
    pub fn new(shape: Vec<usize>, data: Vec<f32>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        Self { shape, data }
    }

    /// The length of the last axis, 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.data.len() / self.cols().max(1)
    }
}

/// Why an executor could not answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExecError {
    /// The message names tensor, file and remedy.
    #[error("{0}")]
    Tensor(String),
    /// The request needs something that this executor was not given, such as calibration tokens.
    #[error("{0}")]
    Unavailable(String),
    /// A value became NaN or infinite.
    #[error("{0}")]
    NotFinite(String),
    /// A device has too little memory.
    #[error("{0}")]
    Memory(String),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Where the calibration stream is to stand after a region was profiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// At the region's exit: the next region sees what this one gives as it is now.
    Exit,
    /// Where it was: whoever drives the compilation moves it when the region has got its final form, so that the next
    /// region sees the errors of this one.
    Entry,
}

/// What a pass may ask of the outside world.
///
/// An executor carries the *calibration stream*: the hidden states of every calibration sequence at the entry of the
/// region that is being compiled. Regions are compiled in order, and
/// [`Executor::profile`] moves the stream on.
pub trait Executor: Sync {
    /// The numbers of a weight as f32: float terms as computed, quantized terms decoded. Float terms are rounded once,
    /// to the element type of the weight itself.
    ///
    /// # Errors
    /// When a tensor cannot be read, or data of the region has no numbers.
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError>;

    /// Runs `region` over the whole calibration stream, which moves to its exit or stays at its entry. Returns, for
    /// each of `taps`, the statistics of that value over all tokens, or, for a value `[E,B,S,C]`, of each expert's rows
    /// in turn. A short sample of the region's inputs stays available to [`Executor::evaluate`] until the next call.
    ///
    /// # Errors
    /// When there is no calibration stream, a tensor cannot be read, or a value is not finite.
    fn profile(
        &mut self,
        region: &Region,
        fused: &[FusedDef],
        taps: &[ValueId],
        afterwards: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError>;

    /// Runs `region` on the sample of its inputs that [`Executor::profile`] kept, or, if none was kept, on synthetic
    /// inputs that depend only on the region's parameter types, and returns the values `at`.
    ///
    /// # Errors
    /// When a tensor cannot be read or a value is not finite.
    fn evaluate(&self, region: &Region, fused: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError>;
}
