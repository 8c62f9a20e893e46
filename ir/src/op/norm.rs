//! Normalisations over the channels.

use serde::{Deserialize, Serialize};

use super::law::{ChannelMap, Law, Port, Sense};
use super::{OpError, OpInfo, Slot, channels, floats, is_default, vector};
use crate::module::FusedDef;
use crate::ty::{Dim, Type};

/// `rms_norm x [, g]`: `x / sqrt(mean(x²) + eps) · (g + offset)`, the mean over the channels, or over each head's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// 1 where the stored gain is the difference from 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub offset: f64,
    /// With a number of heads, each head is normalised by itself and `g` has the channels of one head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<u64>,
}

impl RmsNorm {
    /// Channels normalised together.
    fn width(&self, x: &Type) -> Result<u64, OpError> {
        width(self.heads, x)
    }
}

/// Channels of `x` that are normalised together.
fn width(heads: Option<u64>, x: &Type) -> Result<u64, OpError> {
    let c = channels(x)?;
    match heads {
        None => Ok(c),
        Some(h) if h > 0 && c % h == 0 => Ok(c / h),
        Some(h) => OpError::new(format!("{x} does not divide into {h} heads")),
    }
}

impl OpInfo for RmsNorm {
    const MNEMONIC: &'static str = "rms_norm";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::OptWeight];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of rms_norm", operands[0])?;
        let width = self.width(operands[0])?;
        if let Some(g) = operands.get(1) {
            vector("the gain of rms_norm", g, width)?;
        }
        Ok(vec![operands[0].clone()])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let (x, y) = (Port::Operand(0), Port::Result(0));
        if operands.len() < 2 {
            return vec![Law::Pin(x), Law::Pin(y)];
        }
        let map = match (self.heads, self.width(operands[0])) {
            (Some(_), Ok(width)) => ChannelMap::Modulo(width),
            (None, _) | (_, Err(_)) => ChannelMap::Identity,
        };
        let gain = Law::Parameter { operand: 1, axis: 0, value: y, sense: Sense::Along, map, offset: self.offset };
        vec![Law::Pin(x), gain]
    }
}

/// `layer_norm x [, g [, b]]`: `(x − mean) / sqrt(var + eps) · g + b`, over the channels, or over each head's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f64,
    /// With a number of heads, each head is normalised by itself; `g` and `b` have the channels of one head, or, as
    /// `[heads,width]`, those of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<u64>,
}

impl OpInfo for LayerNorm {
    const MNEMONIC: &'static str = "layer_norm";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::OptWeight, Slot::OptWeight];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of layer_norm", operands[0])?;
        let width = width(self.heads, operands[0])?;
        for (what, ty) in ["the gain of layer_norm", "the bias of layer_norm"].iter().zip(&operands[1..]) {
            let each = self.heads.map(|h| [Dim::Const(h), Dim::Const(width)]);
            match each {
                Some(each) if ty.shape == each && ty.elem.is_float() => {}
                Some(_) | None => vector(what, ty, width)?,
            }
        }
        Ok(vec![operands[0].clone()])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let (x, y) = (Port::Operand(0), Port::Result(0));
        if operands.len() < 2 || operands.iter().skip(1).any(|ty| ty.rank() != 1) {
            return vec![Law::Pin(x), Law::Pin(y)];
        }
        let map = match (self.heads, width(self.heads, operands[0])) {
            (Some(_), Ok(width)) => ChannelMap::Modulo(width),
            (None, _) | (_, Err(_)) => ChannelMap::Identity,
        };
        let along = |operand| Law::Parameter { operand, axis: 0, value: y, sense: Sense::Along, map, offset: 0.0 };
        std::iter::once(Law::Pin(x)).chain((1..operands.len()).map(along)).collect()
    }
}
