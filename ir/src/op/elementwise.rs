//! Ops that work element by element.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port};
use super::{OpError, OpInfo, Slot, floats, is_default};
use crate::module::FusedDef;
use crate::ty::Type;

fn unary(name: &str, operands: &[&Type]) -> Result<Vec<Type>, OpError> {
    floats(&format!("the input of {name}"), operands[0])?;
    Ok(vec![operands[0].clone()])
}

/// A function that commutes with no scale but 1.
fn rigid() -> Vec<Law> {
    vec![Law::Pin(Port::Operand(0)), Law::Pin(Port::Result(0))]
}

/// A function that commutes with every positive scale.
fn homogeneous() -> Vec<Law> {
    vec![Law::same(Port::Result(0), Port::Operand(0))]
}

/// `silu x`: `x · sigmoid(x)`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silu {}

impl OpInfo for Silu {
    const MNEMONIC: &'static str = "silu";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        rigid()
    }
}

/// `sigmoid x`: `1 / (1 + e^−x)`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sigmoid {}

impl OpInfo for Sigmoid {
    const MNEMONIC: &'static str = "sigmoid";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        rigid()
    }
}

/// How [`Gelu`] is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GeluForm {
    /// `x · Φ(x)` by the error function.
    #[default]
    Erf,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    Tanh,
    /// `x · sigmoid(1.702 x)`.
    Quick,
}

/// `gelu x`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gelu {
    /// How it is computed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub form: GeluForm,
}

impl OpInfo for Gelu {
    const MNEMONIC: &'static str = "gelu";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        rigid()
    }
}

/// `relu x`: `max(x, 0)`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relu {}

impl OpInfo for Relu {
    const MNEMONIC: &'static str = "relu";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        homogeneous()
    }
}

/// `scale x {by=k}`: `k · x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// The factor.
    pub by: f64,
}

impl OpInfo for Scale {
    const MNEMONIC: &'static str = "scale";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        homogeneous()
    }
}

/// `softcap x {at=c}`: `c · tanh(x / c)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Softcap {
    /// The bound.
    pub at: f64,
}

impl OpInfo for Softcap {
    const MNEMONIC: &'static str = "softcap";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        if self.at <= 0.0 {
            return OpError::new(format!("softcap needs a positive bound, not {}", self.at));
        }
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        rigid()
    }
}

/// `clamp x {at=c}`: each number limited to `[−c, c]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clamp {
    /// The bound.
    pub at: f64,
}

impl OpInfo for Clamp {
    const MNEMONIC: &'static str = "clamp";
    const OPERANDS: &'static [Slot] = &[Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        if self.at <= 0.0 {
            return OpError::new(format!("clamp needs a positive bound, not {}", self.at));
        }
        unary(Self::MNEMONIC, operands)
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        rigid()
    }
}

/// `add a, b`. `b` may lack leading axes of `a`: a bias, or one row of positions for every sequence.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {}

impl OpInfo for Add {
    const MNEMONIC: &'static str = "add";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (a, b) = (operands[0], operands[1]);
        floats("the left side of add", a)?;
        floats("the right side of add", b)?;
        if b.shape.is_empty() || !a.shape.ends_with(&b.shape) {
            return OpError::new(format!("add of {a} and {b}: the right shape must be a suffix of the left one"));
        }
        Ok(vec![a.clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::same(Port::Result(0), Port::Operand(0)), Law::same(Port::Result(0), Port::Operand(1))]
    }
}

/// `mul a, b`: both of one shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mul {}

impl OpInfo for Mul {
    const MNEMONIC: &'static str = "mul";
    const OPERANDS: &'static [Slot] = &[Slot::Value, Slot::Value];

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let (a, b) = (operands[0], operands[1]);
        floats("the left side of mul", a)?;
        floats("the right side of mul", b)?;
        if a.shape != b.shape {
            return OpError::new(format!("mul of {a} and {b}: the shapes differ"));
        }
        Ok(vec![a.clone()])
    }

    fn scale_law(&self, _: &[&Type], _: &[&Type]) -> Vec<Law> {
        vec![Law::Product { product: Port::Result(0), a: Port::Operand(0), b: Port::Operand(1) }]
    }
}
