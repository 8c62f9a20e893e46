//! Scaled dot-product attention.

use serde::{Deserialize, Serialize};

use super::law::{ChannelMap, Law, Port};
use super::{OpError, OpInfo, Slot, channels, floats, is_default};
use crate::module::FusedDef;
use crate::ty::Type;

/// `sdpa q, k, v`: `q: T[B,S,heads·D]`, `k: T[B,S,kv_heads·D]`, `v: T[B,S,kv_heads·E]` to `T[B,S,heads·E]`.
///
/// `softmax(cap(scale · q kᵀ) + alibi + mask) v`, head by head; query head `h` reads key/value head `h / (heads/kv_heads)`.
/// Where no position limits what is seen (no `causal`, `window` or `alibi`), `k` and `v` may have another number of
/// rows than `q`. A causal `sdpa` at position `i` depends on positions up to `i` only, so an executor may keep `k` and
/// `v` of earlier positions (the KV cache) and run the new ones alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sdpa {
    /// Position `i` sees positions up to `i`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub causal: bool,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads: a divisor of `heads`.
    pub kv_heads: u64,
    /// The factor on the scores; `1/√D` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Position `i` sees the last `window` positions only, itself included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Scores become `c · tanh(score / c)` before the mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softcap: Option<f64>,
    /// Scores get a bias that is linear in the distance of positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alibi: Option<Alibi>,
}

/// Linear position biases: head `h`'s score of the key at position `j` gets `scale · m_h · j` (ALiBi, arXiv 2108.12409,
/// section 3). With `n` heads, a power of two, `m_h = 2^(−max·(h+1)/n)`; otherwise the first heads have the slopes of
/// the largest power of two below `n`, the others every second slope of the next one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alibi {
    /// The last head's slope is `2^−max`.
    pub max: f64,
    /// A factor on all slopes.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub scale: f64,
}

fn unit() -> f64 {
    1.0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde wants
fn is_unit(k: &f64) -> bool {
    *k == 1.0
}

impl Alibi {
    /// The slope of each of `heads` heads, `scale` included.
    pub fn slopes(&self, heads: u64) -> Vec<f64> {
        let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 }.max(1);
        let slope = |k: u64, n: u64| self.scale * (-self.max * k as f64 / n as f64).exp2();
        let first = (1..=whole).map(|k| slope(k, whole));
        first.chain((1..=whole).map(|k| slope(2 * k - 1, 2 * whole))).take(heads as usize).collect()
    }
}

impl Sdpa {
    /// Channels of one query or key head, given the type of `q`.
    pub fn head_dim(&self, q: &Type) -> u64 {
        q.channels().unwrap_or(0) / self.heads.max(1)
    }
}

impl OpInfo for Sdpa {
    const MNEMONIC: &'static str = "sdpa";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value, Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (q, k, v) = (operands[0], operands[1], operands[2]);
        let placed = self.causal || self.window.is_some() || self.alibi.is_some();
        for (what, ty) in [("q", q), ("k", k), ("v", v)] {
            floats(&format!("{what} of sdpa"), ty)?;
            if ty.rank() != 3 || ty.shape[0] != q.shape[0] || placed && ty.shape[1] != q.shape[1] {
                return OpError::new(format!("{what} of sdpa must be [B,S,C] like q, this is {ty}"));
            }
        }
        if k.shape[1] != v.shape[1] {
            return OpError::new(format!("k {k} and v {v} differ in the number of rows"));
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) || self.heads == 0 {
            return OpError::new(format!("{} query heads cannot share {} key/value heads", self.heads, self.kv_heads));
        }
        let (cq, ck, cv) = (channels(q)?, channels(k)?, channels(v)?);
        if cq % self.heads != 0 || ck % self.kv_heads != 0 || cq / self.heads != ck / self.kv_heads {
            return OpError::new(format!(
                "q {q} with {} heads and k {k} with {} heads differ in head size",
                self.heads, self.kv_heads
            ));
        }
        if cv % self.kv_heads != 0 {
            return OpError::new(format!("v {v} does not divide into {} heads", self.kv_heads));
        }
        if self.window == Some(0) {
            return OpError::new("a window of 0 positions sees nothing");
        }
        Ok(vec![q.with_last((cv / self.kv_heads * self.heads).into())])
    }

    fn scale_law(&self, operands: &[&Type], _: &[&Type]) -> Vec<Law> {
        let width = operands[2].channels().unwrap_or(0) / self.kv_heads.max(1);
        let map = ChannelMap::Grouped { width, times: self.heads / self.kv_heads.max(1) };
        vec![
            Law::Pin(Port::Operand(0)),
            Law::Pin(Port::Operand(1)),
            Law::Tie { left: Port::Result(0), right: Port::Operand(2), map },
        ]
    }
}
