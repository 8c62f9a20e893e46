//! `linear x, W [, b]`: `y = x Wᵀ + b`.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port, Sense};
use super::{OpError, OpInfo, Slot, channels, floats, vector};
use crate::module::FusedDef;
use crate::ty::Type;

/// `x: T[…,in]`, `W: [out,in]` float or quantized, `b: [out]`; the result is `T[…,out]`. With rows of several experts,
/// `x: T[E,…,in]`, each has its own matrix, `W: [E,out,in]`, and there is no bias.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {}

impl OpInfo for Linear {
    const MNEMONIC: &'static str = "linear";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Weight, Slot::OptWeight];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, w) = (operands[0], operands[1]);
        floats("the input of linear", x)?;
        let (out, input) = match w.const_shape().as_deref() {
            Some(&[out, input]) if x.experts() == 1 => (out, input),
            Some(&[experts, out, input]) if x.rank() == 4 && x.experts() == experts as u64 => {
                if operands.len() > 2 {
                    return OpError::new("a linear of several experts has no bias");
                }
                (out, input)
            }
            Some(_) | None => {
                return OpError::new(format!(
                    "the weight of linear must be [out,in], or [E,out,in] for rows of E experts, this is {w} for {x}"
                ));
            }
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
        let rows = operands[1].rank().saturating_sub(2);
        let mut laws = vec![
            Law::parameter(1, rows + 1, Port::Operand(0), Sense::Against),
            Law::parameter(1, rows, Port::Result(0), Sense::Along),
        ];
        if operands.len() > 2 {
            laws.push(Law::parameter(2, 0, Port::Result(0), Sense::Along));
        }
        laws
    }
}
