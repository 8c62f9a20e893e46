//! Attention of a text's tokens to something beside the text, of which each token sees one piece.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port};
use super::{Domain, OpError, OpInfo, Sdpa, Slot, channels, floats};
use crate::module::FusedDef;
use crate::ty::{Elem, Type};

/// `count i {token=t}`: `i: i32[B,S]` to `i32[B,S]`: how many tokens `t` the sequence holds up to each position, that
/// one included. Like a causal `sdpa` it depends on earlier positions only, and an executor that keeps their number may
/// run the new ones alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {
    /// The token that is counted.
    pub token: u32,
}

impl OpInfo for Count {
    const MNEMONIC: &'static str = "count";
    const OPERANDS: &'static [Slot] = &[Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let ids = operands[0];
        if ids.elem != Elem::I32 || ids.rank() != 2 {
            return OpError::new(format!("count takes tokens i32[B,S], this is {ids}"));
        }
        Ok(vec![ids.clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        Vec::new()
    }
}

/// `cross_sdpa q, k, v, i`: `q: T[B,S,heads·D]`, `k: T[N,L,kv_heads·D]`, `v: T[N,L,kv_heads·E]`, `i: i32[B,S]` to
/// `T[B,S,heads·E]`. The `N` pieces of the memory belong to the sequences in equal shares; position `s` of sequence `b`
/// attends to the `L` rows of its sequence's piece number `i[b,s]`, counted from 1. Where that is 0 the result is 0.
///
/// Alayrac et al., arXiv 2204.14198, section 2.3: each token sees the image before it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossSdpa {
    /// Query heads.
    pub heads: u64,
    /// Key/value heads: a divisor of `heads`.
    pub kv_heads: u64,
    /// The factor on the scores; `1/√D` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
}

impl CrossSdpa {
    /// The attention of the positions to one piece of the memory.
    pub fn within(&self) -> Sdpa {
        let Self { heads, kv_heads, scale } = self.clone();
        Sdpa { causal: false, heads, kv_heads, scale, window: None, softcap: None, alibi: None }
    }
}

impl OpInfo for CrossSdpa {
    const MNEMONIC: &'static str = "cross_sdpa";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value, Slot::Value, Slot::Value];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], fused: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (q, k, v, which) = (operands[0], operands[1], operands[2], operands[3]);
        floats("q of cross_sdpa", q)?;
        if q.rank() != 3 || k.rank() != 3 || which.elem != Elem::I32 || which.shape != q.shape[..2] {
            return OpError::new(format!(
                "cross_sdpa takes q [B,S,C], k and v [N,L,C] and pieces i32[B,S]; these are {q}, {k}, {v} and {which}"
            ));
        }
        // Within one piece it is an attention like any other.
        let rows = Type::new(q.elem, [k.shape[0].clone(), q.shape[1].clone(), channels(q)?.into()]);
        let out = self.within().infer(&[&rows, k, v], fused)?;
        Ok(out
            .into_iter()
            .map(|ty| Type::new(ty.elem, [q.shape[0].clone(), q.shape[1].clone(), ty.shape[2].clone()]))
            .collect())
    }

    fn scale_law(&self, operands: &[&Type], results: &[&Type]) -> Vec<Law> {
        self.within().scale_law(operands, results)
    }
}

/// `gate x, g`: `x · tanh g` with one number, `g: T[1]` (arXiv 2204.14198, section 2.3).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {}

impl OpInfo for Gate {
    const MNEMONIC: &'static str = "gate";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Weight];
    const DOMAIN: Domain = Domain::Images;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of gate", operands[0])?;
        super::vector("the gate", operands[1], 1)?;
        Ok(vec![operands[0].clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0))]
    }
}
