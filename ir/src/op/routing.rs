//! Mixtures of experts: which experts a token goes to, the rows that each of them sees, and the sum of what they say.
//!
//! Between [`Dispatch`] and [`Combine`] a value has the type `T[E,B,S,C]`: for each expert, the rows of the tokens that
//! were sent to it. Rows of other tokens do not exist: nothing reads them, and executors do not compute them. A
//! `linear` on such a value has one matrix an expert, `[E,out,in]`; ops that treat each row by itself are used as they
//! are.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port};
use super::{Domain, OpError, OpInfo, Slot, channels, floats, is_default, vector};
use crate::module::FusedDef;
use crate::ty::{Dim, Elem, Type};

/// `softmax x`: `e^x / Σ e^x` over the channels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Softmax {}

impl OpInfo for Softmax {
    const MNEMONIC: &'static str = "softmax";
    const OPERANDS: &'static [Slot] = &[Slot::Value];
    const DOMAIN: Domain = Domain::Experts;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        floats("the input of softmax", operands[0])?;
        channels(operands[0])?;
        Ok(vec![operands[0].clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Pin(Port::Operand(0)), Law::Pin(Port::Result(0))]
    }
}

/// How the best group of experts is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// By its best expert.
    #[default]
    Best,
    /// By the sum of its two best experts.
    TwoBest,
}

/// Experts in equal groups, of which only some may be chosen from (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Number of groups.
    pub count: u64,
    /// How many of them stay.
    pub keep: u64,
    /// How groups are compared.
    #[serde(default, skip_serializing_if = "is_default")]
    pub by: GroupScore,
}

/// `top_k p [, b] {k}`: `p: T[…,E]` to `w: T[…,k]`, the `k` largest scores, largest first, and `i: i32[…,k]`, whose they
/// are. Of equal ones the first counts. With `b: [E]` the choice is made by `p + b`, and `w` still holds `p`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopK {
    /// How many.
    pub k: u64,
    /// Only experts of the best groups are chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Groups>,
    /// `w` is divided by its sum.
    #[serde(default, skip_serializing_if = "is_default")]
    pub normalize: bool,
    /// `w` is multiplied by this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// `p` holds logits, and each chosen expert's weight is its share in a softmax over those not chosen before that
    /// are near it: `(best − p) / max(|p|, best) ≤ 2 · near` (SparseMixer, arXiv 2310.00811).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<f64>,
}

impl OpInfo for TopK {
    const MNEMONIC: &'static str = "top_k";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::OptWeight];
    const DOMAIN: Domain = Domain::Experts;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let p = operands[0];
        floats("the input of top_k", p)?;
        let experts = channels(p)?;
        if let Some(b) = operands.get(1) {
            vector("the bias of top_k", b, experts)?;
        }
        if self.k == 0 || self.k > experts {
            return OpError::new(format!("top_k takes {} of {experts}", self.k));
        }
        if let Some(g) = &self.groups {
            let least = if g.by == GroupScore::TwoBest { 2 } else { 1 };
            let size = experts / g.count.max(1);
            if g.count == 0 || !experts.is_multiple_of(g.count) || g.keep == 0 || g.keep > g.count || size < least {
                return OpError::new(format!("{} of {} groups of {experts} experts", g.keep, g.count));
            }
            if self.k > g.keep * size {
                return OpError::new(format!("top_k takes {} of the {} experts of its groups", self.k, g.keep * size));
            }
        }
        Ok(vec![p.with_last(self.k.into()), p.with_last(self.k.into()).with_elem(Elem::I32)])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Pin(Port::Operand(0)), Law::Pin(Port::Result(0))]
    }
}

/// `dispatch x, i {experts=E}`: `x: T[B,S,C]`, `i: i32[B,S,k]` to `T[E,B,S,C]`: expert `e` has the rows of the tokens
/// whose `i` holds `e`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dispatch {
    /// Number of experts.
    pub experts: u64,
}

/// More experts than any layer has; a run counts the rows of each.
const MOST: u64 = 1 << 16;

/// Fails unless `i` holds expert numbers for the tokens of `x`.
fn chosen(i: &Type, x: &[Dim]) -> Result<(), OpError> {
    if i.elem == Elem::I32 && i.rank() == 3 && i.shape.get(..2) == x.get(..2) {
        return Ok(());
    }
    OpError::new(format!("the experts of tokens must be i32[B,S,k], these are {i}"))
}

impl OpInfo for Dispatch {
    const MNEMONIC: &'static str = "dispatch";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value];
    const DOMAIN: Domain = Domain::Experts;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (x, i) = (operands[0], operands[1]);
        floats("the input of dispatch", x)?;
        channels(x)?;
        if x.rank() != 3 || self.experts == 0 || self.experts > MOST {
            return OpError::new(format!(
                "dispatch sends [B,S,C] to 1 to {MOST} experts, this is {x} to {}",
                self.experts
            ));
        }
        chosen(i, &x.shape)?;
        Ok(vec![Type::new(x.elem, [Dim::Const(self.experts)].into_iter().chain(x.shape.iter().cloned()))])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0))]
    }
}

/// `combine y, w, i`: `y: T[E,B,S,C]`, `w: T[B,S,k]`, `i: i32[B,S,k]` to `T[B,S,C]`: `Σ_j w[…,j] · y[i[…,j],…]`. `i` is what
/// `y` was dispatched by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {}

impl OpInfo for Combine {
    const MNEMONIC: &'static str = "combine";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value, Slot::Value];
    const DOMAIN: Domain = Domain::Experts;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (y, w, i) = (operands[0], operands[1], operands[2]);
        floats("the input of combine", y)?;
        floats("the weights of combine", w)?;
        let ([_, tokens @ ..], 4) = (y.shape.as_slice(), y.rank()) else {
            return OpError::new(format!("combine adds up rows of experts, [E,B,S,C], this is {y}"));
        };
        chosen(i, tokens)?;
        if w.shape != i.shape {
            return OpError::new(format!("combine needs one weight for each chosen expert, {w} and {i} differ"));
        }
        Ok(vec![Type::new(y.elem, tokens.iter().cloned())])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Operand(0), Port::Result(0)), Law::Pin(Port::Operand(1))]
    }
}
