//! The ops that back ends with kernels of their own leave to the reference meaning.

use awqc_ir::Op;
use awqc_ir::op::Domain;

/// Why a back end with kernels of its own for these domains, besides that of text, has none for an op, whatever its
/// operands; `None` where it has one.
pub fn without_kernels(op: &Op, covered: &[Domain]) -> Option<&'static str> {
    match op.domain() {
        Domain::Text => None,
        domain if covered.contains(&domain) => None,
        Domain::Experts => Some("mixtures of experts have no kernels here: use the reference target"),
        Domain::Images => Some("models that take images have no kernels here: use the reference target"),
        Domain::Foreign => Some("an op of another system has no meaning until a rule gives it one"),
    }
}
