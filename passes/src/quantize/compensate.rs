//! `method=gptq`: codes with error compensation, matrix by matrix.

use std::rc::Rc;
use std::sync::Arc;

use awqc_ir::{Data, DataId, Dim, Quant, Region, ValueId, WeightId};

use super::error::unclipped;
use crate::analysis::inputs::{gram, inputs};
use crate::analysis::linears::{LinearUse, label};
use crate::facts::{FEW_TOKENS, InputStats};
use crate::gptq::{self, Factor, FactorError, Grids};
use crate::pass::{PassCx, PassError};
use crate::remark::RemarkKind;
use crate::rtn::{self, Codes};

/// How to compensate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) damp: f64,
    pub(super) block: usize,
    pub(super) act_order: bool,
    pub(super) static_groups: bool,
}

/// The factor that was made last, and the inputs that it is of: linears that read one value share it.
#[derive(Default)]
pub(super) struct Last(Option<(Vec<ValueId>, Rc<Factor>)>);

/// The codes of `weight`, which the linears `uses` read; `None` when there is nothing to go by for any of its matrices,
/// so that it is to be rounded. What was not done as asked goes to the remarks.
pub(super) fn codes(
    region: &Region,
    weight: WeightId,
    uses: &[LinearUse],
    quant: Quant,
    plan: Plan,
    last: &mut Last,
    cx: &mut PassCx<'_>,
) -> Result<Option<Codes>, PassError> {
    let name = label(region, weight);
    let clipped = cx.exec.realize(region, weight)?;
    let source = unclipped(region, weight);
    // A clip narrows the grids; what it cut off is an error like others.
    let whole = if source == weight { None } else { Some(cx.exec.realize(region, source)?) };
    let target = whole.as_ref().map_or(&clipped.data, |t| &t.data);
    let cols = clipped.cols();
    let ty = &region.weight(weight).ty;
    let matrices = ty.shape.first().and_then(Dim::as_const).filter(|_| ty.rank() == 3).unwrap_or(1) as usize;
    let size = (target.len() / matrices.max(1)).max(1);
    let mut out = Codes { quant, rows: 0, cols, codes: Vec::new(), scales: Vec::new(), zeros: Vec::new() };
    let mut problems = Problems::default();
    let mut compensated = 0;
    for (e, (clipped, target)) in clipped.data.chunks(size).zip(target.chunks(size)).enumerate() {
        let rounded = rtn::quantize(clipped, target.len() / cols.max(1), cols, quant);
        let found = match statistics(uses, e, cols, cx) {
            Err(why) => Err(why),
            Ok(stats) => {
                let gram = gram(&stats);
                factor(&gram, cols, plan, uses, matrices, last).map(|factor| (gram, factor)).map_err(|e| e.to_string())
            }
        };
        let part = match found {
            Err(why) => {
                problems.add(e, format!("{why}: rounded to the nearest code"));
                rounded
            }
            Ok((gram, factor)) => {
                if factor.damp > plan.damp {
                    problems.add(e, format!("damping was raised from {} to {}", plan.damp, factor.damp));
                }
                let grids = match plan.static_groups {
                    true => Grids::Given { scales: &rounded.scales, zeros: &rounded.zeros },
                    false => Grids::Running(rtn::Grid::spanning),
                };
                let mut codes = gptq::compensate(target, cols, &factor, grids, quant, plan.block).codes;
                let kept = gptq::keep_better(&mut codes, &rounded, target, &gram);
                compensated += 1;
                cx.remarks.count("rows", codes.rows as f64);
                cx.remarks.count("rows rounded", kept.rows as f64);
                cx.remarks.count("dead columns", factor.dead.iter().filter(|d| **d).count() as f64);
                codes
            }
        };
        out.rows += part.rows;
        out.codes.extend(part.codes);
        out.scales.extend(part.scales);
        out.zeros.extend(part.zeros);
    }
    for (experts, message) in problems.0 {
        let place = if matrices > 1 { format!("{name}, experts {}", list(&experts)) } else { name.clone() };
        cx.remarks.push(RemarkKind::Warning, format!("{place}: {message}"));
    }
    Ok((compensated > 0).then_some(out))
}

/// Makes codes, scales and zero points data of the region, in the order of [`awqc_ir::WeightExpr::Codes`]. `name` is
/// what people call the weight.
pub fn code_data(region: &mut Region, name: &str, codes: Codes) -> [DataId; 3] {
    let groups = codes.groups() as u64;
    let (rows, cols) = (codes.rows as u64, codes.cols as u64);
    let floats = |bytes: &[u8]| -> Arc<[f32]> { bytes.iter().map(|b| f32::from(*b)).collect() };
    let mut add = |base: &str, what: &str, cols: u64, values: Arc<[f32]>| -> DataId {
        let (fresh, label) = (region.fresh_data_name(base), format!("{what} of {name}"));
        region.add_data(Data { name: fresh, label: label.into(), shape: vec![rows, cols], values: Some(values) })
    };
    let q = add("q", "codes", cols, floats(&codes.codes));
    let s = add("s", "scales", groups, Arc::from(codes.scales));
    let z = add("z", "zero points", groups, floats(&codes.zeros));
    [q, s, z]
}

fn statistics<'f>(
    uses: &[LinearUse],
    matrix: usize,
    cols: usize,
    cx: &'f PassCx<'_>,
) -> Result<Vec<&'f InputStats>, String> {
    let stats = inputs(uses, matrix, cols, cx.facts)?;
    match stats.iter().map(|s| s.tokens).sum::<u64>() {
        few if few < FEW_TOKENS => Err("too few calibration tokens came by".to_owned()),
        _enough => Ok(stats),
    }
}

fn factor(
    gram: &[f32],
    cols: usize,
    plan: Plan,
    uses: &[LinearUse],
    matrices: usize,
    last: &mut Last,
) -> Result<Rc<Factor>, FactorError> {
    let mut values: Vec<ValueId> = uses.iter().map(|l| l.input).collect();
    values.sort_unstable();
    values.dedup();
    if let Some((of, factor)) = last.0.as_ref().filter(|_| matrices == 1)
        && *of == values
    {
        return Ok(factor.clone());
    }
    // Before a new one is made, the old one goes: they are large.
    last.0 = None;
    let made = Rc::new(Factor::new(gram, cols, plan.damp, plan.act_order)?);
    if matrices == 1 {
        last.0 = Some((values, made.clone()));
    }
    Ok(made)
}

/// What was not done as asked, and for which matrices.
#[derive(Default)]
struct Problems(Vec<(Vec<usize>, String)>);

impl Problems {
    fn add(&mut self, matrix: usize, message: String) {
        match self.0.iter_mut().find(|(_, m)| *m == message) {
            Some((matrices, _)) => matrices.push(matrix),
            None => self.0.push((vec![matrix], message)),
        }
    }
}

fn list(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
