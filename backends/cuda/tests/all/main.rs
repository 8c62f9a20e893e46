//! The back end for CUDA, on a machine without a GPU.

mod attention;
#[path = "../emulator/mod.rs"]
mod emulator;
mod experts;
mod layers;
mod probe;
mod products;
mod rows;
mod support;
mod text;
