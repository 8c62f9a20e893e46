//! Activation-aware weight quantization as published, step by step: what the searches of this crate are compared with.

pub mod reference;
