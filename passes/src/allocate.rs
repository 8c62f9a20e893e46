//! Spreading a mean of bits over the linears of a model where it costs least.
//!
//! What rounding a linear costs is estimated from two sides: how much the model's loss minds an error in its output
//! ([`cost`]), and how the error falls with the width ([`distortion`]). Both are rough; the order that they give is
//! what counts. Such an allocation by second-order sensitivity is HAWQ-V2's (arXiv 1911.03852).

mod cost;

use awqc_ir::Quant;

pub use cost::{costs, covered};

/// Linears that get one width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unit {
    /// Elements of their weights.
    pub elements: u64,
    /// The expected loss when they are rounded to [`MEASURED`] bits, at least 0.
    pub cost: f64,
}

/// The bits at which costs are measured; those of other widths follow from it by [`distortion`].
pub const MEASURED: u8 = 4;

/// How the squared error of rounding falls with the width: as the square of the step between two of the 2ᵇ codes that
/// share a range. With scales, clips and compensation at work it falls like that, measured on the outputs of linears:
/// 4.1 times from 3 bits to 4 in groups of 64, 4.1 to 4.7 times in groups of 16, and 4.7 to 5.8 times from 2 bits to 3.
/// The best quantizer of a normal variable would have it fall 3.2 times a bit (Max, 1960), but groups have hardly a
/// tail to cut off, and 0 must stay a code: by that law too many linears would get 2 bits.
pub fn distortion(bits: u8) -> Option<f64> {
    Quant::BITS.contains(&bits).then(|| (f64::from(1u16 << bits) - 1.0).powi(-2))
}

/// Why bits cannot be spread.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// A width that no code can have, or none at all.
    #[error("widths {0:?} are not possible: use some of 2, 3, 4 and 8")]
    Widths(Vec<u8>),
    /// A cost is not a number that can be compared.
    #[error("the expected loss of unit {0} is not a finite number of at least 0")]
    Cost(usize),
    /// Not even the smallest widths fit.
    #[error("a mean of less than {0} bits is asked for, the smallest width")]
    Mean(u8),
}

/// One width for each unit, so that the mean over all elements is at most `mean`, and the expected loss is small: all
/// units begin with the smallest width, and the next step of width goes to the unit that gains most by it for a bit.
/// Steps that do not fit any more are passed over. Without that rest the result is the best possible, because what a
/// step gains for a bit falls with the width.
///
/// Ties go to the unit that comes first. A larger mean never gives a larger loss.
///
/// # Errors
/// When a width is not possible, a cost is negative or not finite, or the mean is below the smallest width.
pub fn allocate(units: &[Unit], widths: &[u8], mean: f64) -> Result<Vec<u8>, AllocateError> {
    let mut widths = widths.to_vec();
    widths.sort_unstable();
    widths.dedup();
    let errors: Option<Vec<f64>> = widths.iter().map(|b| distortion(*b)).collect();
    let (Some(errors), Some(lowest)) = (errors, widths.first().copied()) else {
        return Err(AllocateError::Widths(widths));
    };
    if let Some(bad) = units.iter().position(|u| !u.cost.is_finite() || u.cost < 0.0) {
        return Err(AllocateError::Cost(bad));
    }
    let elements: u64 = units.iter().map(|u| u.elements).sum();
    let budget = mean * elements as f64;
    let mut used = f64::from(lowest) * elements as f64;
    if used > budget || mean.is_nan() {
        return Err(AllocateError::Mean(lowest));
    }
    let measured = distortion(MEASURED).unwrap_or(1.0);
    // Every step of every unit: what it gains for a bit. Within a unit the gains fall, so its steps stay in order.
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (at, unit) in units.iter().enumerate().filter(|(_, u)| u.elements > 0) {
        for to in 1..widths.len() {
            let gain = unit.cost * (errors[to - 1] - errors[to]) / measured;
            steps.push((gain / (f64::from(widths[to] - widths[to - 1]) * unit.elements as f64), at, to));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut chosen = vec![0; units.len()];
    for (_, at, to) in steps {
        let more = f64::from(widths[to] - widths[to - 1]) * units[at].elements as f64;
        if chosen[at] + 1 == to && used + more <= budget {
            chosen[at] = to;
            used += more;
        }
    }
    Ok(chosen.into_iter().map(|w| widths[w]).collect())
}

/// The mean bits of an element; 0 for no elements.
pub fn mean_bits(units: &[Unit], widths: &[u8]) -> f64 {
    let elements: u64 = units.iter().map(|u| u.elements).sum();
    let bits: u64 = units.iter().zip(widths).map(|(u, w)| u.elements * u64::from(*w)).sum();
    if elements == 0 { 0.0 } else { bits as f64 / elements as f64 }
}

/// The expected loss of an allocation; infinite for a width that no code can have.
pub fn expected_loss(units: &[Unit], widths: &[u8]) -> f64 {
    let measured = distortion(MEASURED).unwrap_or(1.0);
    let loss = |(unit, width): (&Unit, &u8)| unit.cost * distortion(*width).unwrap_or(f64::INFINITY) / measured;
    units.iter().zip(widths).map(loss).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTHS: [u8; 4] = Quant::BITS;

    fn unit(elements: u64, cost: f64) -> Unit {
        Unit { elements, cost }
    }

    #[test]
    fn rounding_loses_as_the_distortion_says() {
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        // Nearly normal.
        let weights: Vec<f32> = (0..256 * 64).map(|_| (0..8).map(|_| uniform()).sum()).collect();
        let error = |bits: u8| {
            let quant = Quant { bits, symmetric: false, group: awqc_ir::Group::Size(64) };
            let rounded = crate::rtn::quantize(&weights, 256, 64, quant).decode();
            rounded.iter().zip(&weights).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        for bits in WIDTHS {
            let (got, want) =
                (error(bits) / error(MEASURED), distortion(bits).unwrap() / distortion(MEASURED).unwrap());
            assert!((got / want - 1.0).abs() < 0.25, "{bits} bits: {got} times the error of {MEASURED}, not {want}");
        }
    }

    #[test]
    fn bits_go_where_they_gain_most() {
        // Costs ten times apart: the first is worth a step from 4 to 8 when the last is at 2.
        let units = [unit(100, 100.0), unit(100, 10.0), unit(100, 1.0)];
        assert_eq!(allocate(&units, &WIDTHS, 2.0), Ok(vec![2, 2, 2]));
        assert_eq!(allocate(&units, &WIDTHS, 3.0), Ok(vec![4, 3, 2]));
        assert_eq!(allocate(&units, &[4, 3], 3.4), Ok(vec![4, 3, 3]));
        assert_eq!(allocate(&units, &WIDTHS, 8.0), Ok(vec![8, 8, 8]));
        // The large one does not fit any more, the small one does.
        let units = [unit(1000, 100.0), unit(10, 0.1)];
        assert_eq!(allocate(&units, &[3, 4], 3.5), Ok(vec![3, 4]));
        // Nothing to tell them apart by: in order. Units without elements cost nothing.
        let units = [unit(10, 0.0), unit(0, 0.0), unit(10, 0.0)];
        assert_eq!(allocate(&units, &[3, 4], 3.5), Ok(vec![4, 3, 3]));
        assert_eq!((mean_bits(&units, &[4, 3, 3]), mean_bits(&[], &[])), (3.5, 0.0));
    }

    #[test]
    fn what_cannot_be_spread_is_refused() {
        let units = [unit(10, 1.0), unit(10, f64::NAN)];
        assert_eq!(allocate(&units, &WIDTHS, 3.0), Err(AllocateError::Cost(1)));
        assert_eq!(allocate(&units[..1], &WIDTHS, 1.9), Err(AllocateError::Mean(2)));
        assert_eq!(allocate(&units[..1], &WIDTHS, f64::NAN), Err(AllocateError::Mean(2)));
        assert_eq!(allocate(&units[..1], &[3, 5], 4.0), Err(AllocateError::Widths(vec![3, 5])));
        assert_eq!(allocate(&units[..1], &[], 4.0), Err(AllocateError::Widths(vec![])));
    }

    proptest! {
        #[test]
        fn the_budget_is_kept_and_more_of_it_never_hurts(
            units in prop::collection::vec((0u64..5000, 0.0f64..1e3), 1..30),
            small in 2.0f64..8.0,
            more in 0.0f64..2.0,
        ) {
            let units: Vec<Unit> = units.into_iter().map(|(e, c)| unit(e, c)).collect();
            let (a, b) = (allocate(&units, &WIDTHS, small).unwrap(), allocate(&units, &WIDTHS, small + more).unwrap());
            prop_assert!(mean_bits(&units, &a) <= small);
            let (loss_a, loss_b) = (expected_loss(&units, &a), expected_loss(&units, &b));
            prop_assert!(loss_b <= loss_a * (1.0 + 1e-12), "{} at {}, {} at {}", loss_a, small, loss_b, small + more);
            // Within one unit of the best: what is left of the budget is too little for any step.
            let left = (small - mean_bits(&units, &a)) * units.iter().map(|u| u.elements).sum::<u64>() as f64;
            let next = units.iter().zip(&a).filter(|(u, w)| **w < 8 && u.elements > 0);
            let next = next.map(|(u, w)| u.elements * if *w == 4 { 4 } else { 1 }).min();
            if let Some(step) = next {
                prop_assert!(left < step as f64 + 1e-6, "{} bits are left, a step takes {}", left, step);
            }
        }

        #[test]
        fn no_other_allocation_of_as_many_bits_is_better_by_more_than_a_step(
            units in prop::collection::vec((1u64..50, 0.0f64..1e3), 1..6),
            mean in 2.0f64..8.0,
        ) {
            let units: Vec<Unit> = units.into_iter().map(|(e, c)| unit(e, c)).collect();
            let chosen = expected_loss(&units, &allocate(&units, &WIDTHS, mean).unwrap());
            let step = units.iter().map(|u| u.cost * distortion(2).unwrap() / distortion(MEASURED).unwrap()).fold(0.0, f64::max);
            for code in 0..4usize.pow(units.len() as u32) {
                let widths: Vec<u8> = (0..units.len()).map(|i| WIDTHS[code / 4usize.pow(i as u32) % 4]).collect();
                if mean_bits(&units, &widths) <= mean {
                    prop_assert!(chosen <= expected_loss(&units, &widths) + step);
                }
            }
        }
    }
}
