//! The executor's tests, one binary: ops, their scale laws, whole models, weight expressions, artefacts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod emit;
mod images;
mod ops;
mod realize;
mod scale_laws;
mod session;
mod support;
