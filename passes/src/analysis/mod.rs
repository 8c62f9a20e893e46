//! Analyses: what passes need to know about a region before they change it. None of them changes anything.

pub mod gauge;
pub(crate) mod inputs;
pub mod linears;
pub mod objective;
