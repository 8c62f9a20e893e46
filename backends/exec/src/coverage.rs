//! The ops that back ends with kernels of their own leave to the reference meaning.

use awqc_ir::Op;
use awqc_ir::op::Domain;

/// Why back ends with kernels of their own have none for an op, whatever its operands; `None` where they have one.
pub fn without_kernels(op: &Op) -> Option<&'static str> {
    match op.domain() {
        Domain::Text => None,
        Domain::Experts => Some("mixtures of experts have no kernels here: use the reference target"),
        Domain::Images => Some("models that take images have no kernels here: use the reference target"),
        Domain::Foreign => Some("an op of another system has no meaning until a rule gives it one"),
    }
}
