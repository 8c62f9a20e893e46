//! From weight expressions to numbers.
//!
//! Arithmetic is f32. A float weight is rounded once, to its own element type; a float term below `quant` is not
//! rounded at all, so that quantization sees what the passes computed.

use awqc_ir::tensor::reads_as;
use awqc_ir::{DataId, DataRef, Dim, Elem, Group, Quant, Region, Stored, TensorSource, Type, WeightExpr, WeightId};
use awqc_passes::rtn::{self, Codes};
use awqc_passes::{ExecError, Tensor};
use rayon::prelude::*;

use crate::layout;

/// Rows quantized by one task: rows are independent, so the cut does not show in the result.
const QUANT_ROWS: usize = 64;

/// The numbers of a weight.
#[derive(Clone, Debug, PartialEq)]
pub enum Realized {
    /// Floats, row-major.
    Float {
        /// Outermost axis first.
        shape: Vec<usize>,
        /// `shape.product()` numbers.
        data: Vec<f32>,
    },
    /// A quantized matrix.
    Quant(Codes),
}

impl Realized {
    /// The shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Realized::Float { shape, .. } => shape.clone(),
            Realized::Quant(codes) => vec![codes.rows, codes.cols],
        }
    }

    /// The numbers as f32: quantized ones decoded.
    pub fn into_tensor(self) -> Tensor {
        match self {
            Realized::Float { shape, data } => Tensor { shape, data },
            Realized::Quant(codes) => Tensor { shape: vec![codes.rows, codes.cols], data: codes.decode() },
        }
    }
}

/// The numbers of `weight`; a float weight is rounded to its element type.
///
/// # Errors
/// When a tensor is missing, cannot be read, has another shape than its type says or holds NaN or infinity; when a data
/// entry has no numbers; when the result is not finite. The message names tensor and weight.
pub fn realize(region: &Region, weight: WeightId, source: &dyn TensorSource) -> Result<Realized, ExecError> {
    let cx = Cx { region, source };
    let mut out = cx.term(weight)?;
    if let Realized::Float { data, .. } = &mut out {
        let elem = region.weight(weight).ty.elem;
        if elem == Elem::F32 || cx.stored_as(weight, elem) {
            return Ok(out);
        }
        data.par_chunks_mut(1 << 16).for_each(|part| part.iter_mut().for_each(|v| *v = elem.round(*v)));
        if let Some(at) = data.iter().position(|v| !v.is_finite()) {
            return Err(cx.error(
                weight,
                format!("element {at} is {} after rounding to {elem}: it does not fit that type", data[at]),
            ));
        }
    }
    Ok(out)
}

/// The numbers of `weight` as f32, in its own shape, quantized ones decoded.
///
/// # Errors
/// As [`realize`].
pub fn tensor(region: &Region, weight: WeightId, source: &dyn TensorSource) -> Result<Tensor, ExecError> {
    let mut out = realize(region, weight, source)?.into_tensor();
    // Codes are the rows of all matrices of a stack.
    if let Some(shape) = region.weight(weight).ty.const_shape() {
        out.shape = shape;
    }
    Ok(out)
}

struct Cx<'a> {
    region: &'a Region,
    source: &'a dyn TensorSource,
}

impl Cx<'_> {
    fn error(&self, weight: WeightId, message: impl std::fmt::Display) -> ExecError {
        let name = self.region.weight(weight).name.as_deref().unwrap_or("(unnamed)");
        ExecError::Tensor(format!("weight ${name} of region {}: {message}", self.region.name))
    }

    /// The numbers of a term, not rounded.
    fn term(&self, id: WeightId) -> Result<Realized, ExecError> {
        let weight = self.region.weight(id);
        let out = match &weight.expr {
            WeightExpr::Source(name) => self.read(id, &self.region.tensor_name(name))?,
            WeightExpr::Packed { tensor, layout } => {
                let (quant, rows, cols) = self.matrix(id, &weight.ty)?;
                let stem = self.region.tensor_name(tensor);
                Realized::Quant(
                    layout::read(self.source, &stem, *layout, quant, rows, cols).map_err(|e| ExecError::Tensor(e.0))?,
                )
            }
            WeightExpr::Param(at) => {
                return Err(
                    self.error(id, format!("it is parameter {at} of a fused body and has numbers only inside a call"))
                );
            }
            WeightExpr::Mul { axis, of, by } => self.scaled(id, *axis, *of, *by, |w, s| w * s)?,
            WeightExpr::Div { axis, of, by } => self.scaled(id, *axis, *of, *by, |w, s| w / s)?,
            WeightExpr::Offset { of, by } => {
                let (shape, mut data) = self.float(*of)?;
                data.iter_mut().for_each(|v| *v += *by as f32);
                Realized::Float { shape, data }
            }
            WeightExpr::Cat { axis, parts } => self.cat(id, *axis, parts)?,
            WeightExpr::Stack(parts) => self.stack(id, parts)?,
            WeightExpr::Rows { of, start, len } => {
                let (start, len) = (self.size(id, *start)?, self.size(id, *len)?);
                rows(&self.term(*of)?, start, len).ok_or_else(|| self.error(id, "the rows are outside of the term"))?
            }
            WeightExpr::Transpose(of) => {
                let (shape, data) = self.float(*of)?;
                let [r, c] = shape[..] else { return Err(self.error(id, "only a matrix can be transposed")) };
                Realized::Float { shape: vec![c, r], data: transpose(&data, r, c) }
            }
            WeightExpr::Clip { of, lo, hi, group } => self.clip(id, *of, *lo, *hi, *group)?,
            WeightExpr::Quant(of) => {
                let (quant, rows, cols) = self.matrix(id, &weight.ty)?;
                let (_, data) = self.float(*of)?;
                if data.len() != rows * cols {
                    return Err(self.error(id, format!("{} numbers for {}", data.len(), weight.ty)));
                }
                Realized::Quant(quantize(&data, rows, cols, quant))
            }
            WeightExpr::Codes { codes, scales, zeros, .. } => self.codes(id, *codes, *scales, *zeros)?,
            WeightExpr::Pack(of) => self.term(*of)?,
        };
        let fits = match &out {
            Realized::Float { shape, .. } => weight.ty.const_shape().as_ref() == Some(shape),
            // Codes are the rows of all matrices of a stack.
            Realized::Quant(codes) => weight.ty.matrix() == Some((codes.rows, codes.cols)),
        };
        if !fits {
            return Err(self.error(id, format!("its type is {}, the numbers have shape {:?}", weight.ty, out.shape())));
        }
        Ok(out)
    }

    fn read(&self, id: WeightId, name: &str) -> Result<Realized, ExecError> {
        let Some(info) = self.source.info(name) else {
            return Err(self.error(id, format!("the checkpoint has no tensor `{name}`")));
        };
        let ty = &self.region.weight(id).ty;
        let Some(shape) = ty.const_shape().filter(|shape| reads_as(&info.shape, shape)) else {
            return Err(self.error(
                id,
                format!("tensor `{name}` has shape {:?} in the checkpoint, the model description says {ty}: are config and weights of one model?", info.shape),
            ));
        };
        let data = self.source.read_f32(name).map_err(|e| ExecError::Tensor(e.0))?;
        if data.len() != info.shape.iter().product::<usize>() {
            return Err(
                self.error(id, format!("tensor `{name}` holds {} numbers, its shape is {:?}", data.len(), info.shape))
            );
        }
        if let Some(at) = data.iter().position(|v| !v.is_finite()) {
            return Err(self
                .error(id, format!("tensor `{name}` holds {} at element {at}: the checkpoint is damaged", data[at])));
        }
        Ok(Realized::Float { shape, data })
    }

    /// Whether a weight is a checkpoint tensor of this element type: rounding would change nothing.
    fn stored_as(&self, id: WeightId, elem: Elem) -> bool {
        let WeightExpr::Source(name) = &self.region.weight(id).expr else { return false };
        let stored = self.source.info(&self.region.tensor_name(name)).map(|i| i.stored);
        matches!((stored, elem), (Some(Stored::F16), Elem::F16) | (Some(Stored::Bf16), Elem::Bf16))
    }

    fn float(&self, id: WeightId) -> Result<(Vec<usize>, Vec<f32>), ExecError> {
        match self.term(id)? {
            Realized::Float { shape, data } => Ok((shape, data)),
            Realized::Quant(_) => Err(self.error(id, "a float term is needed here, this one is quantized")),
        }
    }

    fn data(&self, id: WeightId, data: DataId) -> Result<&[f32], ExecError> {
        let entry = self.region.data(data);
        let values = entry.values.as_deref().ok_or_else(|| {
            self.error(
                id,
                format!(
                    "#{} ({}) has no numbers: give the sidecar that belongs to this module",
                    entry.name, entry.label
                ),
            )
        })?;
        if values.len() as u64 != entry.shape.iter().product::<u64>() {
            return Err(
                self.error(id, format!("#{} has {} numbers, its shape is {:?}", entry.name, values.len(), entry.shape))
            );
        }
        Ok(values)
    }

    fn size(&self, id: WeightId, n: u64) -> Result<usize, ExecError> {
        usize::try_from(n).map_err(|_| self.error(id, format!("{n} rows are more than this machine can address")))
    }

    fn matrix(&self, id: WeightId, ty: &Type) -> Result<(Quant, usize, usize), ExecError> {
        match (ty.elem.quant(), ty.matrix()) {
            (Some(quant), Some((rows, cols))) => Ok((quant, rows, cols)),
            (None, _) | (_, None) => {
                Err(self.error(id, format!("a quantized weight must be a quantized matrix, this is {ty}")))
            }
        }
    }

    fn scaled(
        &self,
        id: WeightId,
        axis: usize,
        of: WeightId,
        by: DataRef,
        f: fn(f32, f32) -> f32,
    ) -> Result<Realized, ExecError> {
        let (shape, mut data) = self.float(of)?;
        let entries = self.data(id, by.id)?;
        let Some(&channels) = shape.get(axis) else {
            return Err(self.error(id, format!("the term has no axis {axis}")));
        };
        let inner: usize = shape[axis + 1..].iter().product();
        // In a stack, the factors are those of every matrix, or of each.
        let all = if axis > 0 { shape[0] * channels } else { channels };
        let covered = by.map.len(entries.len() as u64);
        let channels = if shape.len() == 3 && covered == all as u64 { all } else { channels };
        if covered != channels as u64 {
            return Err(self.error(id, format!("{} factors do not cover {channels} channels", entries.len())));
        }
        let factor = |c: usize| match by.map.entry(c as u64, entries.len() as u64) {
            None => Some(1.0),
            Some(e) => usize::try_from(e).ok().and_then(|e| entries.get(e).copied()),
        };
        let factors: Option<Vec<f32>> = (0..channels).map(factor).collect();
        let factors = factors.ok_or_else(|| self.error(id, "a channel has no factor"))?;
        let cols = shape.last().copied().unwrap_or(1).max(1);
        if inner == 1 {
            // Rows of one matrix, `out` of them, share their run of factors.
            let out = if shape.len() == 3 && channels > cols { shape[1].max(1) } else { usize::MAX };
            for (r, row) in data.chunks_mut(cols).enumerate() {
                let at = r / out * cols;
                row.iter_mut().zip(&factors[at..]).for_each(|(w, s)| *w = f(*w, *s));
            }
        } else {
            for (run, s) in data.chunks_mut(inner.max(1)).zip(factors.iter().cycle()) {
                run.iter_mut().for_each(|w| *w = f(*w, *s));
            }
        }
        match data.iter().all(|v| v.is_finite()) {
            true => Ok(Realized::Float { shape, data }),
            false => {
                Err(self.error(id, format!("scaling by #{} makes a number infinite", self.region.data(by.id).name)))
            }
        }
    }

    fn cat(&self, id: WeightId, axis: usize, parts: &[WeightId]) -> Result<Realized, ExecError> {
        let terms = parts.iter().map(|p| self.term(*p)).collect::<Result<Vec<_>, _>>()?;
        let mut floats = Vec::new();
        let mut codes = Vec::new();
        for term in terms {
            match term {
                Realized::Float { shape, data } => floats.push((shape, data)),
                Realized::Quant(part) => codes.push(part),
            }
        }
        match (codes.is_empty(), floats.is_empty()) {
            (false, true) => {
                // In a stack, matrix joins matrix.
                let shape = parts.first().map_or(&[][..], |p| &self.region.weight(*p).ty.shape);
                let outer = shape.iter().take(axis).filter_map(Dim::as_const).product();
                let joined = if axis + 1 == shape.len() { None } else { cat_codes(self.size(id, outer)?, &codes) };
                joined
                    .map(Realized::Quant)
                    .ok_or_else(|| self.error(id, "quantized parts must agree in type and concatenate row by row"))
            }
            (true, false) => cat_floats(axis, &floats).ok_or_else(|| self.error(id, "the parts do not fit together")),
            (false, false) | (true, true) => Err(self.error(id, "cat needs parts of one kind")),
        }
    }

    fn stack(&self, id: WeightId, parts: &[WeightId]) -> Result<Realized, ExecError> {
        match self.cat(id, 0, parts)? {
            Realized::Float { mut shape, data } => {
                if let Some(first) = shape.first_mut() {
                    *first /= parts.len().max(1);
                }
                shape.insert(0, parts.len());
                Ok(Realized::Float { shape, data })
            }
            codes @ Realized::Quant(_) => Ok(codes),
        }
    }

    /// The codes that a pass chose. What they stand for is not read.
    fn codes(&self, id: WeightId, codes: DataId, scales: DataId, zeros: DataId) -> Result<Realized, ExecError> {
        let (quant, rows, cols) = self.matrix(id, &self.region.weight(id).ty)?;
        let wrong = |data: DataId, found: String| {
            let entry = self.region.data(data);
            self.error(id, format!("#{} ({}) {found}: compile the model again", entry.name, entry.label))
        };
        let sized = |data: DataId, want: usize| {
            let values = self.data(id, data)?;
            let found = values.len();
            if found == want { Ok(values) } else { Err(wrong(data, format!("has {found} numbers, {want} are needed"))) }
        };
        let stored = |data: DataId, want: usize, lo: u8, hi: u8| {
            let fits = |v: &f32| v.fract() == 0.0 && (f32::from(lo)..=f32::from(hi)).contains(v);
            let values = sized(data, want)?;
            match values.iter().position(|v| !fits(v)) {
                None => Ok(values.iter().map(|v| *v as u8).collect::<Vec<u8>>()),
                Some(at) => {
                    Err(wrong(data, format!("holds {} at {at}, {quant} has whole numbers of {lo} to {hi}", values[at])))
                }
            }
        };
        let groups = quant.group.count(cols);
        let steps = sized(scales, rows * groups)?;
        if let Some(at) = steps.iter().position(|v| !(*v >= 0.0 && rtn::round_f16(*v) == *v)) {
            return Err(wrong(scales, format!("holds {} at {at}, a scale is an f16 and not negative", steps[at])));
        }
        let largest = ((1u16 << quant.bits) - 1) as u8;
        let half = 1 << (quant.bits - 1);
        let (lo, hi) = if quant.symmetric { (half, half) } else { (0, largest) };
        let (codes, zeros) = (stored(codes, rows * cols, 0, largest)?, stored(zeros, rows * groups, lo, hi)?);
        Ok(Realized::Quant(Codes { quant, rows, cols, codes, scales: steps.to_vec(), zeros }))
    }

    fn clip(&self, id: WeightId, of: WeightId, lo: DataId, hi: DataId, group: Group) -> Result<Realized, ExecError> {
        let (shape, mut data) = self.float(of)?;
        let Some((rows, cols)) = self.region.weight(of).ty.matrix() else {
            return Err(self.error(id, "only a matrix can be clipped"));
        };
        let (lo, hi) = (self.data(id, lo)?, self.data(id, hi)?);
        let groups = group.count(cols);
        if lo.len() != rows * groups || hi.len() != rows * groups {
            return Err(self.error(id, format!("clip bounds must be [{rows},{groups}]")));
        }
        for (r, row) in data.chunks_mut(cols.max(1)).enumerate() {
            for (g, run) in row.chunks_mut(group.len(cols)).enumerate() {
                let (lo, hi) = (lo[r * groups + g], hi[r * groups + g]);
                // Not `clamp`, which panics when lo > hi.
                run.iter_mut().for_each(|v| *v = v.max(lo).min(hi));
            }
        }
        Ok(Realized::Float { shape, data })
    }
}

/// [`rtn::quantize`] over blocks of rows in parallel.
fn quantize(data: &[f32], rows: usize, cols: usize, quant: Quant) -> Codes {
    let blocks: Vec<Codes> = data
        .par_chunks((QUANT_ROWS * cols).max(1))
        .map(|block| rtn::quantize(block, block.len() / cols.max(1), cols, quant))
        .collect();
    let mut out =
        Codes { quant, rows, cols, codes: Vec::with_capacity(data.len()), scales: Vec::new(), zeros: Vec::new() };
    for block in blocks {
        out.codes.extend(block.codes);
        out.scales.extend(block.scales);
        out.zeros.extend(block.zeros);
    }
    out
}

/// Rows `start..start+len` of the outermost axis; of codes, rows of the matrix.
pub(crate) fn rows(term: &Realized, start: usize, len: usize) -> Option<Realized> {
    let end = start.checked_add(len)?;
    match term {
        Realized::Float { shape, data } => {
            let total = *shape.first()?;
            let inner: usize = shape[1..].iter().product();
            if end > total {
                return None;
            }
            let mut shape = shape.clone();
            shape[0] = len;
            Some(Realized::Float { shape, data: data.get(start * inner..end * inner)?.to_vec() })
        }
        Realized::Quant(c) => {
            let (cols, groups) = (c.cols, c.groups());
            (end <= c.rows).then(|| {
                Realized::Quant(Codes {
                    quant: c.quant,
                    rows: len,
                    cols,
                    codes: c.codes[start * cols..end * cols].to_vec(),
                    scales: c.scales[start * groups..end * groups].to_vec(),
                    zeros: c.zeros[start * groups..end * groups].to_vec(),
                })
            })
        }
    }
}

fn transpose(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0; data.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for r in r0..(r0 + TILE).min(rows) {
                for c in c0..(c0 + TILE).min(cols) {
                    out[c * rows + r] = data[r * cols + c];
                }
            }
        }
    }
    out
}

/// The rows of `parts`, run by run: `outer` runs of each.
fn cat_codes(outer: usize, parts: &[Codes]) -> Option<Codes> {
    let first = parts.first()?;
    let (quant, cols) = (first.quant, first.cols);
    if parts.iter().any(|p| p.cols != cols || p.quant != quant || !p.rows.is_multiple_of(outer.max(1))) {
        return None;
    }
    let mut out = Codes { quant, rows: 0, cols, codes: Vec::new(), scales: Vec::new(), zeros: Vec::new() };
    let groups = out.groups();
    for o in 0..outer {
        for part in parts {
            let run = part.rows / outer;
            out.rows += run;
            out.codes.extend_from_slice(part.codes.get(o * run * cols..(o + 1) * run * cols)?);
            out.scales.extend_from_slice(part.scales.get(o * run * groups..(o + 1) * run * groups)?);
            out.zeros.extend_from_slice(part.zeros.get(o * run * groups..(o + 1) * run * groups)?);
        }
    }
    Some(out)
}

fn cat_floats(axis: usize, parts: &[(Vec<usize>, Vec<f32>)]) -> Option<Realized> {
    let (first, _) = parts.first()?;
    let outer: usize = first.get(..axis)?.iter().product();
    let mut shape = first.clone();
    *shape.get_mut(axis)? = 0;
    for (part, _) in parts {
        let fits =
            part.len() == shape.len() && part.iter().zip(first).enumerate().all(|(i, (a, b))| i == axis || a == b);
        if !fits {
            return None;
        }
        shape[axis] += part[axis];
    }
    let mut data = Vec::with_capacity(shape.iter().product());
    for o in 0..outer {
        for (part, numbers) in parts {
            let run: usize = part[axis..].iter().product();
            data.extend_from_slice(numbers.get(o * run..(o + 1) * run)?);
        }
    }
    Some(Realized::Float { shape, data })
}
