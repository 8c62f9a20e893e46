//! A model ready to run: weights on the device, decoded once, and a KV cache for every attention.

use std::collections::BTreeMap;

use awqc_ir::{Elem, FusedDef, Name, Region, TensorSource, Verified, WeightExpr, WeightId};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::{Device, FloatTensor};

use crate::chain;
use crate::eye::{Eye, Observer};
use crate::host::Host;
use crate::interp::{Caches, ExecBackend, Interpreter, Val, Weights, upload};
use crate::realize::tensor;

/// Which positions [`Session::forward`] returns logits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// All given positions: `[B,S,vocab]`.
    All,
    /// The last position: `[B,1,vocab]`. The head runs on that row alone.
    Last,
}

/// A prepared module and the state of a generation.
pub struct Session<B: ExecBackend = Host> {
    eye: Option<Eye<B>>,
    /// What the eye made of the images at hand.
    images: Option<Val<B>>,
    /// The regions behind the eye.
    regions: Vec<Prepared<B>>,
    fused: Vec<FusedDef>,
    sequence: Option<Name>,
    device: Device<B>,
    past: usize,
    batch: usize,
}

struct Prepared<B: ExecBackend> {
    region: Region,
    weights: Weights<B>,
    caches: Caches<B>,
}

impl<B: ExecBackend> Session<B> {
    /// Reads and decodes all weights. A tensor that several regions use as it is (tied embeddings) is kept once.
    ///
    /// # Errors
    /// As [`realize`].
    pub fn new(module: Verified<'_>, source: &dyn TensorSource, device: Device<B>) -> Result<Self, ExecError> {
        let mut shared: BTreeMap<(String, Elem), FloatTensor<B>> = BTreeMap::new();
        let eye = Eye::open(module, source, device.clone())?;
        let (_, text) = module.eye_and_text();
        let mut regions = Vec::with_capacity(text.len());
        for region in text {
            let mut weights = Weights::empty();
            for id in region.used_weights() {
                let key = plain(region, id);
                let tensor = match key.as_ref().and_then(|k| shared.get(k)) {
                    Some(tensor) => tensor.clone(),
                    None => upload::<B>(tensor(region, id, source)?, &device),
                };
                if let Some(key) = key {
                    shared.insert(key, tensor.clone());
                }
                weights.insert(id, tensor);
            }
            regions.push(Prepared { region: region.clone(), weights, caches: Caches::new() });
        }
        let (fused, sequence) = (module.fused.clone(), chain::sequence(&module));
        Ok(Self { eye, images: None, regions, fused, sequence, device, past: 0, batch: 0 })
    }

    /// Begins a text with images, `pixels: [N,C,H,W]`: runs the regions that see images, once. The sequences of a
    /// batch have equal shares of the images. `observe` is shown what each of these regions makes of them.
    ///
    /// # Errors
    /// When the model takes no images, or others than these; and what `observe` returns.
    pub fn see(&mut self, pixels: Tensor, observe: &mut Observer<'_>) -> Result<(), ExecError> {
        self.reset();
        let blind = || ExecError::Unavailable("the model takes text alone, no images".into());
        self.images = Some(self.eye.as_ref().ok_or_else(blind)?.see(pixels, observe)?);
        Ok(())
    }

    /// Positions that the caches hold.
    pub fn position(&self) -> usize {
        self.past
    }

    /// Forgets all earlier positions, and the images.
    pub fn reset(&mut self) {
        self.images = None;
        self.regions.iter_mut().for_each(|r| r.caches = Caches::new());
        (self.past, self.batch) = (0, 0);
    }

    /// The logits of `ids`, which continue what the session has seen since the last reset.
    ///
    /// # Errors
    /// When an id is outside the embedding table. The caches are then no longer in step: [`Session::reset`] is called.
    pub fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, ExecError> {
        self.forward_batch(&[ids], logits)
    }

    /// As [`Session::forward`], for sequences of one length.
    ///
    /// # Errors
    /// As there, and when the sequences differ in length or their number differs from the one at the last reset.
    pub fn forward_batch(&mut self, ids: &[&[i32]], logits: Logits) -> Result<Tensor, ExecError> {
        self.advance(ids, logits, None)
    }

    /// As [`Session::forward_batch`]; shows the first value of the stream at the exit of every region but the last and
    /// those of the eye: the hidden states between the layers.
    ///
    /// # Errors
    /// As there, and what `observe` returns.
    pub fn trace(
        &mut self,
        ids: &[&[i32]],
        logits: Logits,
        observe: &mut dyn FnMut(&Region, Tensor) -> Result<(), ExecError>,
    ) -> Result<Tensor, ExecError> {
        self.advance(ids, logits, Some(observe))
    }

    fn advance(
        &mut self,
        ids: &[&[i32]],
        logits: Logits,
        observe: Option<&mut Observer<'_>>,
    ) -> Result<Tensor, ExecError> {
        let out = self.step(ids, logits, observe);
        match &out {
            Ok(_) => self.past += ids.first().map_or(0, |s| s.len()),
            Err(_) => self.reset(),
        }
        out
    }

    fn step(
        &mut self,
        ids: &[&[i32]],
        logits: Logits,
        mut observe: Option<&mut Observer<'_>>,
    ) -> Result<Tensor, ExecError> {
        let (batch, seq) = (ids.len(), ids.first().map_or(0, |s| s.len()));
        if batch == 0 || seq == 0 || ids.iter().any(|s| s.len() != seq) {
            return Err(ExecError::Unavailable("a batch needs at least one token, and sequences of one length".into()));
        }
        if self.past > 0 && batch != self.batch {
            return Err(ExecError::Unavailable(format!(
                "the session holds {} sequences, {batch} are given: reset it first",
                self.batch
            )));
        }
        self.batch = batch;
        let interpreter = Interpreter::<B> { fused: &self.fused, device: &self.device };
        let mut stream = chain::start(ids.concat(), batch, self.past, &self.device)?;
        // Images are seen once; without any, the eye is asked what it makes of none.
        if let Some(eye) = &self.eye {
            stream.insert(0, self.images.clone().map_or_else(|| eye.blink(), Ok)?);
        }
        let last = self.regions.len().saturating_sub(1);
        for (i, prepared) in self.regions.iter_mut().enumerate() {
            let Prepared { region, weights, caches } = prepared;
            let (mut inputs, rest) = chain::enter(stream, region)?;
            if let (true, Logits::Last, Some(sequence)) = (i == last, logits, &self.sequence)
                && chain::rowwise(region, &self.fused)
            {
                inputs = chain::positions(region, &inputs, sequence, seq - 1, 1);
            }
            stream = interpreter.run(region, weights, inputs, Some(caches), &mut |_, _| Ok(()))?;
            stream.extend(rest);
            if let (true, Some(first), Some(observe)) = (i != last, stream.first(), &mut observe) {
                observe(region, first.to_tensor()?)?;
            }
        }
        let out = stream.into_iter().next().ok_or_else(|| ExecError::Tensor("the module returns nothing".into()))?;
        let mut out = Val::to_tensor(&out)?;
        if let (Logits::Last, &[b, s, v]) = (logits, out.shape.as_slice())
            && s > 1
        {
            let rows = (0..b).flat_map(|b| &out.data[((b + 1) * s - 1) * v..(b + 1) * s * v]);
            out = Tensor { shape: vec![b, 1, v], data: rows.copied().collect() };
        }
        Ok(out)
    }
}

/// The full name and element type of a weight that is a checkpoint tensor and nothing else.
fn plain(region: &Region, id: WeightId) -> Option<(String, Elem)> {
    let weight = region.weight(id);
    match &weight.expr {
        WeightExpr::Source(name) => Some((region.tensor_name(name), weight.ty.elem)),
        WeightExpr::Packed { .. }
        | WeightExpr::Param(_)
        | WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Cat { .. }
        | WeightExpr::Stack(_)
        | WeightExpr::Rows { .. }
        | WeightExpr::Transpose(_)
        | WeightExpr::Clip { .. }
        | WeightExpr::Codes { .. }
        | WeightExpr::Quant(_)
        | WeightExpr::Pack(_) => None,
    }
}
