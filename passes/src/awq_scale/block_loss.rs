//! The loss of scales by running the region: mean squared error of the output of the block around the site's linears,
//! the paper's own objective (equation 4).

use awqc_ir::{Elem, Region, Type, WeightExpr};

use super::candidates::Candidate;
use crate::analysis::gauge::{self, Site};
use crate::analysis::linears::{LinearUse, quantizable, weights};
use crate::analysis::objective::objective;
use crate::exec::Tensor;
use crate::facts::Facts;
use crate::pass::{PassCx, PassError};
use crate::scheme::Scheme;

/// The loss of each candidate: the site is scaled, its linears are quantized, everything else stays.
pub(super) fn losses(
    region: &Region,
    site: &Site,
    scheme: Scheme,
    candidates: &[Candidate],
    cx: &PassCx<'_>,
) -> Result<Vec<f64>, PassError> {
    let linears: Vec<_> =
        quantizable(region).into_iter().filter(|l| site.consumers.iter().any(|p| p.weight == l.weight)).collect();
    let nodes: Vec<_> = linears.iter().map(|l| l.node).collect();
    // Linears whose outputs never meet again are judged by the region's results.
    let at = objective(region, &nodes).map_or_else(|| region.results().to_vec(), |v| vec![v]);
    let want = cx.exec.evaluate(region, cx.fused, &at)?;
    let mut rounded = Vec::new();
    for weight in weights(&linears) {
        let uses: Vec<LinearUse> = linears.iter().filter(|l| l.weight == weight).copied().collect();
        rounded.push((weight, scheme.of(region, &uses, cx.facts)?));
    }
    let mut losses = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        let mut trial = region.clone();
        gauge::apply(&mut trial, site, &candidate.scales, "trial", &mut Facts::default());
        for (weight, quant) in &rounded {
            let ty = Type::new(Elem::Quant(*quant), trial.weight(*weight).ty.shape.clone());
            trial.wrap_weight(*weight, ty, WeightExpr::Quant);
        }
        let got = cx.exec.evaluate(&trial, cx.fused, &at)?;
        losses.push(mean_squared(&got, &want));
    }
    Ok(losses)
}

fn mean_squared(got: &[Tensor], want: &[Tensor]) -> f64 {
    let (mut sum, mut n) = (0.0f64, 0usize);
    for (got, want) in got.iter().zip(want) {
        sum += got.data.iter().zip(&want.data).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        n += want.data.len();
    }
    sum / n.max(1) as f64
}
