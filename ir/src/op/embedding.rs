//! `embedding i, T`: rows of a table.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port, Sense};
use super::{OpError, OpInfo, Slot, is_default};
use crate::module::FusedDef;
use crate::ty::{Dim, Elem, Type};

/// `i: i32[…]`, `T: [rows,C]` float; the result is `[…,C]` with row `i + offset` of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Added to every index.
    #[serde(default, skip_serializing_if = "is_default")]
    pub offset: u32,
}

impl OpInfo for Embedding {
    const MNEMONIC: &'static str = "embedding";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Weight];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (i, t) = (operands[0], operands[1]);
        if i.elem != Elem::I32 {
            return OpError::new(format!("the indices of embedding must be i32, this is {i}"));
        }
        let ([_, Dim::Const(c)], true) = (t.shape.as_slice(), t.elem.is_float()) else {
            return OpError::new(format!("the table of embedding must be a float matrix [rows,C], this is {t}"));
        };
        Ok(vec![Type::new(t.elem, i.shape.iter().cloned().chain([Dim::Const(*c)]))])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::parameter(1, 1, Port::Result(0), Sense::Along)]
    }
}
