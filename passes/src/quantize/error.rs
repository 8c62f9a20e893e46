//! How much of a linear's output quantization loses.

use std::borrow::Cow;

use awqc_ir::{Region, ValueId, WeightExpr, WeightId};

use crate::dense;
use crate::pass::{PassCx, PassError};
use crate::rtn::Codes;

/// The float term below what was clipped: what a clip cut off belongs to the error.
pub(super) fn unclipped(region: &Region, weight: WeightId) -> WeightId {
    let mut at = weight;
    while let WeightExpr::Clip { of, .. } = &region.weight(at).expr {
        at = *of;
    }
    at
}

/// The squared error of a linear's output relative to the output, over the calibration tokens; `None` without them.
/// `codes` makes the quantized weight of the numbers of the float one.
pub(super) fn relative_error<'c>(
    region: &Region,
    weight: WeightId,
    input: ValueId,
    codes: impl FnOnce(&[f32], usize, usize) -> Cow<'c, Codes>,
    cx: &PassCx<'_>,
) -> Result<Option<f64>, PassError> {
    let Some(stats) = cx.facts.inputs.get(&input).filter(|sets| sets.iter().any(|s| s.tokens > 0)) else {
        return Ok(None);
    };
    let rounded = cx.exec.realize(region, weight)?;
    let (rows, cols) = (rounded.rows(), rounded.cols());
    if stats.iter().any(|s| s.gram.len() != cols * cols) {
        return Ok(None);
    }
    let source = unclipped(region, weight);
    let original = if source == weight { None } else { Some(cx.exec.realize(region, source)?) };
    let original = original.as_ref().map_or(&rounded.data, |t| &t.data);
    let mut error = codes(&rounded.data, rows, cols).decode();
    error.iter_mut().zip(original).for_each(|(e, w)| *e -= w);
    // Of a stack, each matrix meets the statistics of its expert.
    let part = (original.len() / stats.len().max(1)).max(1);
    let energy = |numbers: &[f32]| -> f64 {
        numbers.chunks(part).zip(stats).map(|(w, s)| dense::energy(w, cols, &s.gram)).sum()
    };
    let (output, lost) = (energy(original), energy(&error));
    Ok((output > 0.0).then(|| lost / output))
}
