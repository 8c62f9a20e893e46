//! Inputs for a region when there is no calibration: they depend on its text alone.

use std::collections::BTreeMap;

use awqc_ir::{Dim, Elem, FusedDef, Name, Op, Operand, Region, ValueId};
use awqc_passes::Tensor;
use burn_backend::Backend;
use burn_backend::tensor::Device;

use crate::interp::Val;

/// The sizes that symbolic dimensions get, in order of appearance.
const SIZES: [usize; 3] = [2, 24, 4];

/// Values for the parameters of `region`: floats from about the standard normal distribution, positions counted from
/// 0, ids inside the tables that they index.
pub(crate) fn inputs<B: Backend>(region: &Region, fused: &[FusedDef], device: &Device<B>) -> Vec<Val<B>> {
    let mut dims: BTreeMap<Name, usize> = BTreeMap::new();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        // The splitmix64 generator.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut out = Vec::new();
    for id in region.value_params() {
        let ty = &region.value(id).ty;
        let mut shape = Vec::with_capacity(ty.rank());
        for dim in &ty.shape {
            shape.push(match dim {
                Dim::Const(n) => usize::try_from(*n).unwrap_or(usize::MAX),
                Dim::Sym(name) => {
                    let size = SIZES[dims.len().min(SIZES.len() - 1)];
                    *dims.entry(name.clone()).or_insert(size)
                }
            });
        }
        let len = shape.iter().product();
        out.push(match ty.elem {
            Elem::I32 => {
                let rows = table_rows(region, fused, id).unwrap_or(u64::from(u16::MAX)).max(1);
                let counted = ty.rank() == 1;
                let mut ids: Vec<i32> =
                    (0..len).map(|i| (if counted { i as u64 } else { next() } % rows) as i32).collect();
                if let Some((token, places)) = places(region, id, &dims) {
                    // As many image tokens as there are rows for them, or none.
                    let other = (u64::from(token) + 1) % rows;
                    ids.iter_mut().filter(|id| **id == token as i32).for_each(|id| *id = other as i32);
                    ids.iter_mut().take(if places <= len { places } else { 0 }).for_each(|id| *id = token as i32);
                }
                Val::ints(ids, &shape, device)
            }
            Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::Quant(_) => {
                // Four uniform numbers: bell-shaped, bounded, variance 1.
                let mut unit = || (next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
                let scale = (3.0f32 / 4.0).sqrt();
                let data = (0..len).map(|_| (unit() + unit() + unit() + unit()) * scale).collect();
                Val::floats(Tensor { shape, data }, device)
            }
        });
    }
    out
}

/// The token at whose places in `value` rows of images are put, and how many rows there are.
fn places(region: &Region, value: ValueId, dims: &BTreeMap<Name, usize>) -> Option<(u32, usize)> {
    let reads = |o: Option<&Operand>| o == Some(&Operand::Value(value));
    region.nodes().find_map(|(_, node)| match (&node.op, node.operands.get(2)) {
        (Op::Place(place), Some(rows)) if reads(node.operands.get(1)) => {
            let size = |dim: &Dim| match dim {
                Dim::Const(n) => usize::try_from(*n).ok(),
                Dim::Sym(name) => dims.get(name).copied(),
            };
            let of = region.operand_type(*rows).shape.iter().take(2).map(size).product::<Option<usize>>()?;
            Some((place.token, of))
        }
        _ => None,
    })
}

/// The rows of the smallest table that `value` indexes, offsets taken off.
fn table_rows(region: &Region, fused: &[FusedDef], value: ValueId) -> Option<u64> {
    let mut rows: Option<u64> = None;
    for (_, node) in region.nodes() {
        for (i, operand) in node.operands.iter().enumerate() {
            if *operand != Operand::Value(value) {
                continue;
            }
            let found = if let Op::Embedding(e) = &node.op {
                let table = node.operands.get(1).map(|t| region.operand_type(*t));
                let rows = table.and_then(|ty| ty.shape.first().and_then(Dim::as_const));
                rows.map(|rows| rows.saturating_sub(u64::from(e.offset)))
            } else if let Op::Fused(call) = &node.op {
                let body = fused.iter().find(|d| d.name == call.callee).map(|d| &d.body);
                body.and_then(|body| table_rows(body, fused, body.params().get(i)?.value()?))
            } else if let Op::CrossSdpa(_) = &node.op {
                // The pieces of a memory: of the first of each sequence there is always one.
                Some(2)
            } else {
                None
            };
            rows = match (rows, found) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    rows
}
