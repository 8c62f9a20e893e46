//! The ops that back ends with kernels of their own leave to the reference meaning.
//!
//! These back ends run the regions behind a module's eye. What the eye makes of images, [`crate::Eye`] computes.

use awqc_ir::Op;
use awqc_ir::op::Domain;

/// Why a back end with kernels of its own has none for an op, whatever its operands; `None` where it has one.
pub fn without_kernels(op: &Op) -> Option<&'static str> {
    match op.domain() {
        Domain::Text | Domain::Experts => None,
        Domain::Images => Some("attention of a text to images has no kernels here: use the reference target"),
        Domain::Foreign => Some("an op of another system has no meaning until a rule gives it one"),
    }
}
