//! Images: pixels cut into patches, patches joined with their neighbours, and their place among the tokens of a text.

use serde::{Deserialize, Serialize};

use super::law::{ChannelMap, Law, Port};
use super::{Domain, OpError, OpInfo, Slot, channels, floats};
use crate::module::FusedDef;
use crate::ty::{Dim, Elem, Type};

/// `patches p {size=k}`: `p: T[N,C,H,W]` to `T[N, ⌊H/k⌋·⌊W/k⌋, C·k·k]`. Each square of `k` times `k` pixels becomes a row,
/// from left to right and from top to bottom; in a row, channel comes before line and line before column. Pixels at the
/// right and at the bottom that fill no square are left out.
///
/// A convolution whose stride is its kernel is this and a `linear` (Dosovitskiy et al., arXiv 2010.11929, section 3.1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patches {
    /// Pixels along each side of a patch.
    pub size: u64,
}

impl OpInfo for Patches {
    const MNEMONIC: &'static str = "patches";
    const OPERANDS: &'static [Slot] = &[Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let pixels = operands[0];
        floats("the input of patches", pixels)?;
        let [n, Dim::Const(c), Dim::Const(h), Dim::Const(w)] = pixels.shape.as_slice() else {
            return OpError::new(format!("patches takes pixels [N,C,H,W], this is {pixels}"));
        };
        let count = h.checked_div(self.size).unwrap_or(0).checked_mul(w.checked_div(self.size).unwrap_or(0));
        let width = self.size.checked_mul(self.size).and_then(|k| k.checked_mul(*c));
        match (count, width) {
            (Some(count), Some(width)) if count > 0 => {
                Ok(vec![Type::new(pixels.elem, [n.clone(), count.into(), width.into()])])
            }
            (Some(_) | None, Some(_) | None) => {
                OpError::new(format!("{pixels} holds no patch of {0} times {0} pixels", self.size))
            }
        }
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Pin(Port::Operand(0)), Law::Pin(Port::Result(0))]
    }
}

/// `merge x {side=n, by=k}`: `x: T[N,n·n,C]`, the rows of a square grid, to `T[N,⌈n/k⌉²,k·k·C]`: the rows of each square of
/// `k` times `k` become one row, in which they follow each other from left to right and from top to bottom. Beyond the
/// right and the lower edge of the grid everything is 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// Rows along each side of the grid.
    pub side: u64,
    /// Rows along each side of a square.
    pub by: u64,
}

impl OpInfo for Merge {
    const MNEMONIC: &'static str = "merge";
    const OPERANDS: &'static [Slot] = &[Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let x = operands[0];
        floats("the input of merge", x)?;
        let rows = self.side.checked_mul(self.side);
        match x.shape.as_slice() {
            [_, Dim::Const(rest), _] if rows == Some(*rest) => {}
            _ => return OpError::new(format!("merge takes [N,{0}·{0},C], this is {x}", self.side)),
        }
        let width = self.by.checked_mul(self.by).and_then(|k| k.checked_mul(channels(x).ok()?));
        match width {
            Some(width) if width > 0 => {
                let side = self.side.div_ceil(self.by);
                Ok(vec![Type::new(x.elem, [x.shape[0].clone(), (side * side).into(), width.into()])])
            }
            Some(_) | None => OpError::new(format!("squares of {0} times {0} rows are not possible", self.by)),
        }
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let map = ChannelMap::Modulo(operands[0].channels().unwrap_or(0));
        vec![Law::Tie { left: Port::Result(0), right: Port::Operand(0), map }]
    }
}

/// `place x, i, f {token=t}`: `x: T[B,S,C]` with the rows of `f: T[N,P,C]`, one image after the other, in place of those
/// where `i: i32[B,S]` is `t`, one sequence after the other. There must be as many such tokens as rows, or none: a
/// text that goes on after its images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The token that stands for a row of an image.
    pub token: u32,
}

impl OpInfo for Place {
    const MNEMONIC: &'static str = "place";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value, Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, ids, rows) = (operands[0], operands[1], operands[2]);
        floats("the first operand of place", x)?;
        floats("what place takes", rows)?;
        if x.rank() != 3 || ids.elem != Elem::I32 || ids.shape != x.shape[..2] {
            return OpError::new(format!("place takes x [B,S,C] and its tokens i32[B,S], these are {x} and {ids}"));
        }
        if rows.rank() != 3 || channels(rows)? != channels(x)? {
            return OpError::new(format!("the rows for {x} must be [N,P,C] with as many channels, these are {rows}"));
        }
        Ok(vec![x.clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0)), Law::same(Port::Result(0), Port::Operand(2))]
    }
}
