//! Ops on the rows of a sequence that has no positions in a text: learned rows, rows joined, and rows cut out.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port, Sense};
use super::{Domain, OpError, OpInfo, Slot, channels, floats};
use crate::module::FusedDef;
use crate::ty::{Dim, Type};

/// The sequences, rows and channels of `[N,R,C]`.
fn sequences<'t>(what: &str, ty: &'t Type) -> Result<(&'t Dim, u64, u64), OpError> {
    floats(what, ty)?;
    match ty.shape.as_slice() {
        [n, Dim::Const(rows), Dim::Const(c)] => Ok((n, *rows, *c)),
        _ => OpError::new(format!("{what} must be [N,R,C] with a constant number of rows, this is {ty}")),
    }
}

/// `learned x, W`: the rows of `W: T[R,C]`, or the one row `T[C]`, for each of the sequences of `x: T[N,…]`: `T[N,R,C]`.
/// Of `x` only their number is read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learned {}

impl OpInfo for Learned {
    const MNEMONIC: &'static str = "learned";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Weight];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, w) = (operands[0], operands[1]);
        floats("the rows of learned", w)?;
        let Some(n) = x.shape.first() else {
            return OpError::new(format!("learned needs the number of sequences, the first axis of {x}"));
        };
        let rows = match w.shape.as_slice() {
            [Dim::Const(_)] => 1,
            [Dim::Const(rows), Dim::Const(_)] => *rows,
            _ => return OpError::new(format!("the rows of learned must be [R,C] or [C], this is {w}")),
        };
        Ok(vec![Type::new(w.elem, [n.clone(), rows.into(), channels(w)?.into()])])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::parameter(1, operands[1].rank().saturating_sub(1), Port::Result(0), Sense::Along)]
    }
}

/// `append a, b`: `a: T[N,R,C]`, `b: T[N,Q,C]` to `T[N,R+Q,C]`: the rows of `b` after those of `a`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Append {}

impl OpInfo for Append {
    const MNEMONIC: &'static str = "append";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (a, b) = (operands[0], operands[1]);
        let ((n, r, c), (m, q, d)) = (sequences("an operand of append", a)?, sequences("an operand of append", b)?);
        match r.checked_add(q) {
            Some(rows) if n == m && c == d => Ok(vec![Type::new(a.elem, [n.clone(), rows.into(), c.into()])]),
            Some(_) | None => OpError::new(format!("append of {a} and {b}: only the number of rows may differ")),
        }
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0)), Law::same(Port::Result(0), Port::Operand(1))]
    }
}

/// `cut x {start=s, len=n}`: `n` rows of each sequence of `x: T[N,R,C]`, from row `s`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// The first row.
    pub start: u64,
    /// How many.
    pub len: u64,
}

impl OpInfo for Cut {
    const MNEMONIC: &'static str = "cut";
    const OPERANDS: &'static [Slot] = &[Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let x = operands[0];
        let (n, rows, c) = sequences("the input of cut", x)?;
        match self.start.checked_add(self.len) {
            Some(end) if end <= rows && self.len > 0 => {
                Ok(vec![Type::new(x.elem, [n.clone(), self.len.into(), c.into()])])
            }
            Some(_) | None => OpError::new(format!("{x} has no {} rows from row {}", self.len, self.start)),
        }
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0))]
    }
}
