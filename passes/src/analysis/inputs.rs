//! The statistics of what the matrices of a weight meet.

use std::borrow::Cow;

use awqc_ir::ValueId;

use super::linears::LinearUse;
use crate::facts::{Facts, InputStats};

/// The statistics of what `expert` reads of the distinct inputs of `uses`, each of `cols` channels, or why they will
/// not do.
pub(crate) fn inputs<'f>(
    uses: &[LinearUse],
    expert: usize,
    cols: usize,
    facts: &'f Facts,
) -> Result<Vec<&'f InputStats>, &'static str> {
    let mut values: Vec<ValueId> = uses.iter().map(|l| l.input).collect();
    values.sort_unstable();
    values.dedup();
    let mut out = Vec::new();
    for value in values {
        match facts.inputs.get(&value).and_then(|sets| sets.get(expert)) {
            None => return Err("no statistics of its input: put `profile` before this pass"),
            Some(s) if cols == 0 || s.gram.len() != cols * cols => {
                return Err("the statistics of its input have another size");
            }
            Some(s) if s.tokens == 0 => {}
            Some(s) => out.push(s),
        }
    }
    if out.is_empty() { Err("no calibration token came by") } else { Ok(out) }
}

/// The Gram matrix over the tokens of all inputs.
pub(crate) fn gram<'f>(stats: &[&'f InputStats]) -> Cow<'f, [f32]> {
    match stats {
        [] => Cow::Borrowed(&[]),
        [one] => Cow::Borrowed(&one.gram),
        [first, rest @ ..] => {
            let mut sum = first.gram.clone();
            for s in rest {
                sum.iter_mut().zip(&s.gram).for_each(|(a, b)| *a += b);
            }
            Cow::Owned(sum)
        }
    }
}
