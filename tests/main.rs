//! The one integration binary: everything that needs more than one crate.
#![allow(missing_docs, reason = "tests")]

mod bits;
#[cfg(feature = "burn-cuda")]
mod burn;
mod check_each;
mod cli;
mod cpu;
mod cuda;
#[path = "../backends/cuda/tests/emulator/mod.rs"]
mod emulator;
mod experts;
mod filetests;
mod golden;
mod gpu;
mod images;
mod inputs;
mod models;
mod onnx;
mod saved_logits;
mod sites;
mod studies;
mod tidy;
mod tune;
mod usage;
