//! `fused @name(…)`: the one open op. Its meaning is the body that the module defines for the name.

use serde::{Deserialize, Serialize};

use super::law::{Law, Port};
use super::{OpError, OpInfo, Slot};
use crate::module::FusedDef;
use crate::ty::{Name, Type};

/// A call of the module's fused op `callee`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fused {
    /// The definition's name, without `@`.
    pub callee: Name,
}

impl OpInfo for Fused {
    const MNEMONIC: &'static str = "fused";
    const OPERANDS: &'static [Slot] = &[Slot::Signature];

    fn infer(&self, operands: &[&Type], fused: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        let Some(def) = fused.iter().find(|d| d.name == self.callee) else {
            return OpError::new(format!("fused @{} is not defined in this module", self.callee));
        };
        let body = &def.body;
        if operands.len() != body.params().len() {
            return OpError::new(format!(
                "@{} takes {} operands, {} are given",
                self.callee,
                body.params().len(),
                operands.len()
            ));
        }
        for (i, (got, param)) in operands.iter().zip(body.params()).enumerate() {
            let want = body.operand_type(*param);
            if *got != want {
                return OpError::new(format!("operand {i} of @{} must be {want}, this is {got}", self.callee));
            }
        }
        Ok(body.results().iter().map(|r| body.value(*r).ty.clone()).collect())
    }

    /// Everything pinned: scale freedom is looked for in the inlined graph.
    fn scale_law(&self, operands: &[&Type], results: &[&Type]) -> Vec<Law> {
        let operands = (0..operands.len()).map(|i| Law::Pin(Port::Operand(i)));
        operands.chain((0..results.len()).map(|i| Law::Pin(Port::Result(i)))).collect()
    }
}
