//! Gradients through a model, region by region: the way forth keeps what enters each region, the way back runs a region
//! once more and asks for the gradient at its inputs. So no more than one region's activations and floats are in
//! memory, whatever the number of layers.

mod attention;
mod backward;
#[cfg(test)]
pub(crate) mod example;
mod tracked;

use awqc_ir::{Name, Region, ValueId};
use burn_backend::ops::FloatTensorOps;

use self::backward::add;
pub(crate) use self::backward::{Gradient, backward};
use crate::chain;
use crate::host::Host;
use crate::interp::Val;
use crate::stream::Piece;

/// What runs through the regions for one window.
pub(crate) type Stream = Vec<Val<Host>>;

/// The part of the last region's inputs that a piece of logits is made of; all of them where it cannot be cut along
/// `sequence`.
pub(crate) fn cut(sequence: Option<&Name>, piece: &Piece, head: &Region, inputs: &[Val<Host>]) -> Stream {
    match sequence {
        Some(sequence) => chain::positions(head, inputs, sequence, piece.first, piece.len),
        None => inputs.to_vec(),
    }
}

/// The gradient at the last region's inputs, of those of its pieces in order.
pub(crate) fn join(sequence: Option<&Name>, head: &Region, parts: Vec<Gradient>) -> Gradient {
    let join = |(slot, id): (usize, ValueId)| {
        let axis = sequence.and_then(|s| chain::axis(head, id, s));
        let of: Vec<_> = parts.iter().filter_map(|p| p.get(slot)?.clone()).collect();
        match axis {
            Some(axis) if !of.is_empty() => Some(Host::float_cat(of, axis)),
            Some(_) => None,
            None => of.into_iter().map(Some).fold(None, add),
        }
    };
    head.value_params().enumerate().map(join).collect()
}

/// The gradient at what entered a region with `results` results: that at its inputs, and that of what it did not
/// replace and let go `by`.
pub(crate) fn rejoin(mut inputs: Gradient, results: usize, by: Gradient) -> Gradient {
    inputs.resize(inputs.len().max(results + by.len()), None);
    for (slot, gradient) in inputs.iter_mut().skip(results).zip(by) {
        *slot = add(slot.take(), gradient);
    }
    inputs
}
