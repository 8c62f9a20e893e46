//! Ops that move channels without computing.

use serde::{Deserialize, Serialize};

use super::law::{ChannelMap, Law, Port};
use super::{OpError, OpInfo, Slot, channels, floats};
use crate::module::FusedDef;
use crate::ty::Type;

/// `split x {sizes=[a,b,…]}`: the channels cut into consecutive parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Channels of each part.
    pub sizes: Vec<u64>,
}

impl OpInfo for Split {
    const MNEMONIC: &'static str = "split";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of split", operands[0])?;
        let c = channels(operands[0])?;
        let total = self.sizes.iter().try_fold(0u64, |a, b| a.checked_add(*b));
        if total != Some(c) || self.sizes.is_empty() || self.sizes.contains(&0) {
            return OpError::new(format!(
                "split of {} into {:?}: the sizes must be positive and add up to {c}",
                operands[0], self.sizes
            ));
        }
        Ok(self.sizes.iter().map(|s| operands[0].with_last((*s).into())).collect())
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        let mut start = 0;
        let part = |(i, size): (usize, &u64)| {
            let law = Law::Tie { left: Port::Result(i), right: Port::Operand(0), map: ChannelMap::Shift(start) };
            start += size;
            law
        };
        self.sizes.iter().enumerate().map(part).collect()
    }
}

/// `concat a, b, …`: channels joined; all other axes equal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {}

impl OpInfo for Concat {
    const MNEMONIC: &'static str = "concat";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Values];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let first = operands[0];
        let mut total = 0u64;
        for ty in operands {
            floats("an input of concat", ty)?;
            let c = channels(ty)?;
            if ty.elem != first.elem || ty.with_last(c.into()) != first.with_last(c.into()) {
                return OpError::new(format!("concat of {first} and {ty}: only the last axis may differ"));
            }
            total = total.checked_add(c).ok_or_else(|| OpError("concat is too long".into()))?;
        }
        Ok(vec![first.with_last(total.into())])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let mut start = 0;
        let part = |(i, ty): (usize, &&Type)| {
            let law = Law::Tie { left: Port::Operand(i), right: Port::Result(0), map: ChannelMap::Shift(start) };
            start += ty.channels().unwrap_or(0);
            law
        };
        operands.iter().enumerate().map(part).collect()
    }
}
