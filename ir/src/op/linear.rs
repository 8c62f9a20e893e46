//! `linear x, W [, b]`: `y = x Wᵀ + b`.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port, Sense};
use super::{OpError, OpInfo, Slot, channels, floats, vector};
use crate::module::FusedDef;
use crate::ty::Type;

/// `x: T[…,in]`, `W: [out,in]` float or quantized, `b: [out]`; the result is `T[…,out]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {}

impl OpInfo for Linear {
    const MNEMONIC: &'static str = "linear";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Weight, Slot::OptWeight];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, w) = (operands[0], operands[1]);
        floats("the input of linear", x)?;
        let Some([out, input]) = w.const_shape().and_then(|s| <[usize; 2]>::try_from(s).ok()) else {
            return OpError::new(format!("the weight of linear must be [out,in], this is {w}"));
        };
        if channels(x)? != input as u64 {
            return OpError::new(format!("the weight {w} takes {input} channels, the input is {x}"));
        }
        if let Some(b) = operands.get(2) {
            vector("the bias of linear", b, out as u64)?;
        }
        Ok(vec![x.with_last((out as u64).into())])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let mut laws = vec![
            Law::parameter(1, 1, Port::Operand(0), Sense::Against),
            Law::parameter(1, 0, Port::Result(0), Sense::Along),
        ];
        if operands.len() > 2 {
            laws.push(Law::parameter(2, 0, Port::Result(0), Sense::Along));
        }
        laws
    }
}
