//! Ops that move channels without computing.

use serde::{Deserialize, Serialize};

use super::law::{ChannelMap, Law, Port};
use super::{OpError, OpInfo, Slot, channels, floats};
use crate::module::FusedDef;
use crate::ty::Type;

/// Runs of channels that are cut or joined each by itself: heads. One, and not printed, for all channels.
fn one() -> u64 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde wants
fn is_one(n: &u64) -> bool {
    *n == 1
}

/// `split x {sizes=[a,b,…]}`: the channels cut into consecutive parts. With `heads=h` each of `h` equal runs of channels
/// is cut by itself, and part `i` is the `i`-th parts of all runs, side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Channels of each part, in each run.
    pub sizes: Vec<u64>,
    /// Number of runs.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub heads: u64,
}

impl Split {
    /// Channels cut into consecutive parts.
    pub fn new(sizes: Vec<u64>) -> Self {
        Self { sizes, heads: 1 }
    }

    /// Channels of one run.
    fn stride(&self) -> u64 {
        self.sizes.iter().fold(0u64, |a, b| a.saturating_add(*b))
    }
}

impl OpInfo for Split {
    const MNEMONIC: &'static str = "split";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of split", operands[0])?;
        let c = channels(operands[0])?;
        let run = c / self.heads.max(1);
        if self.heads == 0 || !c.is_multiple_of(self.heads) {
            return OpError::new(format!("split of {}: it does not divide into {} heads", operands[0], self.heads));
        }
        if self.stride() != run || self.sizes.is_empty() || self.sizes.contains(&0) {
            return OpError::new(format!(
                "split of {} into {:?}: the sizes must be positive and add up to {run}",
                operands[0], self.sizes
            ));
        }
        Ok(self.sizes.iter().map(|s| operands[0].with_last((s * self.heads).into())).collect())
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        let mut start = 0;
        let part = |(i, size): (usize, &u64)| {
            let map = match self.heads {
                1 => ChannelMap::Shift(start),
                _ => ChannelMap::Strided { width: *size, stride: self.stride(), start },
            };
            start += size;
            Law::Tie { left: Port::Result(i), right: Port::Operand(0), map }
        };
        self.sizes.iter().enumerate().map(part).collect()
    }
}

/// `concat a, b, …`: channels joined; all other axes equal. With `heads=h` the `i`-th of `h` equal runs of each operand
/// are joined, run by run: the reverse of a split of the same `heads`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {
    /// Number of runs.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub heads: u64,
}

impl Default for Concat {
    fn default() -> Self {
        Self { heads: 1 }
    }
}

impl OpInfo for Concat {
    const MNEMONIC: &'static str = "concat";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Values];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let first = operands[0];
        let mut total = 0u64;
        for ty in operands {
            floats("an input of concat", ty)?;
            let c = channels(ty)?;
            if self.heads == 0 || !c.is_multiple_of(self.heads) {
                return OpError::new(format!("concat of {ty}: it does not divide into {} heads", self.heads));
            }
            if ty.elem != first.elem || ty.with_last(c.into()) != first.with_last(c.into()) {
                return OpError::new(format!("concat of {first} and {ty}: only the last axis may differ"));
            }
            total = total.checked_add(c).ok_or_else(|| OpError("concat is too long".into()))?;
        }
        Ok(vec![first.with_last(total.into())])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let heads = self.heads.max(1);
        let width = |ty: &&Type| ty.channels().unwrap_or(0) / heads;
        let stride = operands.iter().map(width).sum();
        let mut start = 0;
        let part = |(i, ty): (usize, &&Type)| {
            let width = width(ty);
            let map = match heads {
                1 => ChannelMap::Shift(start),
                _ => ChannelMap::Strided { width, stride, start },
            };
            start += width;
            Law::Tie { left: Port::Operand(i), right: Port::Result(0), map }
        };
        operands.iter().enumerate().map(part).collect()
    }
}

/// `repeat x {times=n}`: the channels `n` times over: one head that all heads share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repeat {
    /// How often.
    pub times: u64,
}

impl OpInfo for Repeat {
    const MNEMONIC: &'static str = "repeat";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of repeat", operands[0])?;
        match channels(operands[0])?.checked_mul(self.times) {
            Some(c) if c > 0 => Ok(vec![operands[0].with_last(c.into())]),
            Some(_) | None => OpError::new(format!("{} cannot be repeated {} times", operands[0], self.times)),
        }
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let map = ChannelMap::Modulo(operands[0].channels().unwrap_or(0));
        vec![Law::Tie { left: Port::Result(0), right: Port::Operand(0), map }]
    }
}
