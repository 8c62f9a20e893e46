//! Many windows through a module, region by region: the weights of one region in memory at a time, the hidden states
//! of all windows between regions, and logits a few rows at a time.

use awqc_ir::{Dim, Module, Name, Region, TensorSource, Verified};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::Device;
use burn_backend::{Backend, TensorMetadata};
use rayon::prelude::*;

use crate::chain;
use crate::control::Control;
use crate::host::{self, Host};
use crate::interp::{Interpreter, Val, Weights};

/// Bytes of logits in one chunk, unless one row is more.
const CHUNK_BYTES: u64 = 32 << 20;

/// Some rows of one window's logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// Which rows.
    pub piece: Piece,
    /// `[rows, vocab]`.
    pub logits: Tensor,
}

/// Which rows of which window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the window.
    pub window: usize,
    /// Position of the first row.
    pub first: usize,
    /// Number of rows.
    pub len: usize,
}

/// Runs every window through `module` and gives the logits to `sink`, in order of window and position. Windows start
/// at position 0 and may differ in length.
///
/// # Errors
/// When a tensor cannot be read, an id is outside the table, `control` says stop, or `sink` fails.
pub fn stream(
    module: Verified<'_>,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    control: &Control,
    sink: &mut dyn FnMut(Chunk) -> Result<(), ExecError>,
) -> Result<(), ExecError> {
    let ready = prepare(module, source, windows, control)?;
    for group in ready.pieces().chunks(2 * rayon::current_num_threads()) {
        control.check()?;
        let part = |piece: &Piece| Ok(Chunk { piece: *piece, logits: ready.logits(piece)? });
        for chunk in group.par_iter().map(part).collect::<Result<Vec<_>, ExecError>>()? {
            sink(chunk)?;
        }
    }
    Ok(())
}

/// Every window at the entry of a module's last region, whose weights are loaded: the logits can be had piece by piece,
/// side by side with those of another module.
pub struct Ready<'m> {
    module: &'m Module,
    head: &'m Region,
    weights: Weights<Host>,
    windows: Vec<Vec<Val<Host>>>,
    /// The dimension along which the head can be cut, if it treats each position by itself.
    sequence: Option<Name>,
}

/// Moves every window through all regions of `module` but the last.
///
/// # Errors
/// When a tensor cannot be read, an id is outside the table, or `control` says stop.
pub fn prepare<'m>(
    module: Verified<'m>,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    control: &Control,
) -> Result<Ready<'m>, ExecError> {
    let module = module.module();
    let Some((head, body)) = module.regions.split_last() else {
        return Err(ExecError::Tensor("the module has no regions".into()));
    };
    let mut streams = open::<Host>(windows, &Default::default())?;
    for region in body {
        let weights = Weights::load(region, source, &Default::default())?;
        streams = pass(module, region, &weights, streams, control)?;
    }
    let enter = |stream| chain::enter(stream, head).map(|(inputs, _)| inputs);
    Ok(Ready {
        module,
        head,
        weights: Weights::load(head, source, &Default::default())?,
        windows: streams.into_iter().map(enter).collect::<Result<_, _>>()?,
        sequence: sequence(module, head),
    })
}

impl Ready<'_> {
    /// All logits, cut into pieces of bounded size, in order of window and position.
    pub fn pieces(&self) -> Vec<Piece> {
        let of = |(window, inputs): (usize, &Vec<_>)| pieces(self.head, self.sequence(), window, length(inputs));
        self.windows.iter().enumerate().flat_map(of).collect()
    }

    /// The pieces of one window.
    pub(crate) fn pieces_of(&self, window: usize) -> Vec<Piece> {
        self.pieces().into_iter().filter(|p| p.window == window).collect()
    }

    /// The dimension along which the head is cut into pieces, if it is.
    pub(crate) fn sequence(&self) -> Option<&Name> {
        self.sequence.as_ref()
    }

    /// The logits of a piece, `[rows, vocab]`.
    ///
    /// # Errors
    /// When there is no such window.
    pub fn logits(&self, piece: &Piece) -> Result<Tensor, ExecError> {
        let inputs = self.windows.get(piece.window);
        let inputs = inputs.ok_or_else(|| ExecError::Unavailable(format!("there is no window {}", piece.window)))?;
        let interpreter = Interpreter::<Host> { fused: &self.module.fused, device: &Default::default() };
        let cut = self.sequence.as_ref().map(|s| chain::positions(self.head, inputs, s, piece.first, piece.len));
        let whole = cut.is_none();
        let inputs = cut.unwrap_or_else(|| inputs.clone());
        let out = interpreter.run(self.head, &self.weights, inputs, None, &mut |_, _| Ok(()))?;
        let Some(Val::Float(out)) = out.into_iter().next() else {
            return Err(ExecError::Tensor("the module returns no logits".into()));
        };
        let vocab = out.shape().last().copied().unwrap_or(0);
        let mut data = host::take(out);
        if whole {
            data.truncate((piece.first + piece.len) * vocab);
            data.drain(..(piece.first * vocab).min(data.len()));
        }
        Ok(Tensor { shape: vec![data.len() / vocab.max(1), vocab], data })
    }
}

/// The dimension along which a module's last region can be cut, if it treats each position by itself.
pub(crate) fn sequence(module: &Module, head: &Region) -> Option<Name> {
    chain::sequence(module).filter(|_| chain::rowwise(head, &module.fused))
}

/// The logits of one window, cut into pieces of bounded size.
pub(crate) fn pieces(head: &Region, sequence: Option<&Name>, window: usize, tokens: usize) -> Vec<Piece> {
    let rows = if sequence.is_some() { chunk_rows(head) } else { usize::MAX };
    let cut = |first: usize| Piece { window, first, len: rows.min(tokens - first) };
    (0..tokens).step_by(rows).map(cut).collect()
}

/// The stream of every window at the module's entry.
pub(crate) fn open<B: Backend>(windows: &[Vec<i32>], device: &Device<B>) -> Result<Vec<Vec<Val<B>>>, ExecError> {
    let start = |ids: &Vec<i32>| {
        if ids.is_empty() {
            return Err(ExecError::Unavailable("a window without tokens".into()));
        }
        chain::start(ids.clone(), 1, 0, device)
    };
    windows.iter().map(start).collect()
}

/// Moves every window through one region.
fn pass(
    module: &Module,
    region: &Region,
    weights: &Weights<Host>,
    streams: Vec<Vec<Val<Host>>>,
    control: &Control,
) -> Result<Vec<Vec<Val<Host>>>, ExecError> {
    let interpreter = Interpreter::<Host> { fused: &module.fused, device: &Default::default() };
    let total = streams.len();
    let block = 2 * rayon::current_num_threads();
    let mut out = Vec::with_capacity(total);
    let mut left = streams.into_iter();
    loop {
        let batch: Vec<_> = left.by_ref().take(block).collect();
        if batch.is_empty() {
            return Ok(out);
        }
        control.check()?;
        let moved = batch.into_par_iter().map(|stream| {
            let (inputs, rest) = chain::enter(stream, region)?;
            let mut stream = interpreter.run(region, weights, inputs, None, &mut |_, _| Ok(()))?;
            stream.extend(rest);
            Ok(stream)
        });
        out.extend(moved.collect::<Result<Vec<_>, ExecError>>()?);
        control.report(&region.name, out.len(), total);
    }
}

/// Rows of logits in one chunk: fixed by the vocabulary alone.
fn chunk_rows(region: &Region) -> usize {
    let vocab =
        region.results().first().and_then(|r| region.value(*r).ty.shape.last()).and_then(Dim::as_const).unwrap_or(1);
    (CHUNK_BYTES / (4 * vocab.max(1))).clamp(1, 128) as usize
}

/// The positions of a window: the second axis of its first value, `[1,S,…]`.
fn length(inputs: &[Val<Host>]) -> usize {
    inputs.first().and_then(|v| v.shape().get(1).copied()).unwrap_or(0)
}
