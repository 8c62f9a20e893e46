//! Rotary position embedding: the angles once a forward pass, the rotation in every layer.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port};
use super::{OpError, OpInfo, Slot, channels, floats, is_default};
use crate::module::FusedDef;
use crate::ty::{Dim, Elem, Type};

/// `rope_table pos {dim, theta, …}`: `pos: i32[S]` to `cos, sin: f32[S, dim/2]`.
///
/// Pair `j` turns by `pos · theta^(−2j/dim)` radians, changed by `scaling` (RoFormer, arXiv 2104.09864).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeTable {
    /// Channels rotated in each head: even.
    pub dim: u64,
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for contexts longer than those trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RopeScaling>,
}

/// Changes to the rotary frequencies; `original` is the context length of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Once the sequence is longer than `original`, `theta · (factor · len/original − (factor − 1))^(dim/(dim−2))`.
    Dynamic {
        /// Growth of the base.
        factor: f64,
        /// Context length of training.
        original: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a linear blend between (the scheme of Llama 3.1).
    Bands {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are long.
        low: f64,
        /// Wavelengths below `original / high` are short.
        high: f64,
        /// Context length of training.
        original: f64,
    },
    /// Interpolation by parts with a ramp, and `cos`, `sin` times `attention` (YaRN, arXiv 2309.00071).
    Yarn {
        /// The divisor of interpolated frequencies.
        factor: f64,
        /// Context length of training.
        original: f64,
        /// Rotations at which extrapolation begins.
        beta_fast: f64,
        /// Rotations at which interpolation begins.
        beta_slow: f64,
        /// Factor on `cos` and `sin`.
        attention: f64,
        /// Whether the ramp's ends are rounded to whole pairs.
        truncate: bool,
    },
    /// Pair `j`'s frequency divided by `short[j]`, or by `long[j]` once the sequence is longer than `original`; `cos`
    /// and `sin` times `attention` (LongRoPE, arXiv 2402.13753).
    Long {
        /// Divisors for short sequences, `dim/2` of them.
        short: Vec<f64>,
        /// Divisors for long sequences, `dim/2` of them.
        long: Vec<f64>,
        /// Context length of training.
        original: f64,
        /// Factor on `cos` and `sin`.
        attention: f64,
    },
}

impl RopeTable {
    /// Whether the frequencies change with the length of the sequence.
    pub fn depends_on_length(&self) -> bool {
        match &self.scaling {
            None | Some(RopeScaling::Linear { .. } | RopeScaling::Bands { .. } | RopeScaling::Yarn { .. }) => false,
            Some(RopeScaling::Dynamic { .. } | RopeScaling::Long { .. }) => true,
        }
    }
}

impl OpInfo for RopeTable {
    const MNEMONIC: &'static str = "rope_table";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let pos = operands[0];
        if pos.elem != Elem::I32 || pos.rank() != 1 {
            return OpError::new(format!("the positions of rope_table must be i32[S], this is {pos}"));
        }
        if self.dim == 0 || !self.dim.is_multiple_of(2) {
            return OpError::new(format!("rope_table needs an even, positive dim, not {}", self.dim));
        }
        if let Some(RopeScaling::Long { short, long, .. }) = &self.scaling {
            let pairs = self.dim / 2;
            if short.len() as u64 != pairs || long.len() as u64 != pairs {
                return OpError::new(format!("long rope scaling needs {pairs} short and long factors"));
            }
        }
        let ty = Type::new(Elem::F32, [pos.shape[0].clone(), Dim::Const(self.dim / 2)]);
        Ok(vec![ty.clone(), ty])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Pin(Port::Result(0)), Law::Pin(Port::Result(1))]
    }
}

/// `rope x, cos, sin {heads}`: in each head of `x: T[B,S,heads·D]`, the first `2·P` channels are rotated pairwise by
/// the angles of `cos, sin: [S,P]`, the others pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Number of heads.
    pub heads: u64,
    /// Pairs are neighbours `(2j, 2j+1)`; otherwise `(j, j + P)`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub interleaved: bool,
}

impl OpInfo for Rope {
    const MNEMONIC: &'static str = "rope";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value, Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, cos, sin) = (operands[0], operands[1], operands[2]);
        floats("the input of rope", x)?;
        let c = channels(x)?;
        if x.rank() != 3 || self.heads == 0 || !c.is_multiple_of(self.heads) {
            return OpError::new(format!(
                "the input of rope must be [B,S,C] with C a multiple of {} heads, this is {x}",
                self.heads
            ));
        }
        if cos != sin || cos.rank() != 2 || cos.shape[0] != x.shape[1] {
            return OpError::new(format!("the angles of rope must be two equal [S,P], these are {cos} and {sin}"));
        }
        if channels(cos)? * 2 > c / self.heads {
            return OpError::new(format!("rope turns {} channels, a head has {}", channels(cos)? * 2, c / self.heads));
        }
        Ok(vec![x.clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Pin(Port::Operand(0)), Law::Pin(Port::Result(0))]
    }
}
