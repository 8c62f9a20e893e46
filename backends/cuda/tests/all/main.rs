//! The back end for CUDA, on a machine without a GPU.

#[path = "../emulator/mod.rs"]
mod emulator;
mod products;
mod support;
