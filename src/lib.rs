//! The driver of `awqc`, as a library: open a model, run a pipeline over it, write an artefact, measure it.
//!
//! The program is [`main`] with a [`Registry`](awqc_passes::Registry); a tool with passes of its own calls it with a
//! longer registry. The parts are re-exported: [`ir`], [`frontends`], [`passes`], [`exec`], [`cpu`], [`cuda`].

pub use awqc_cpu as cpu;
pub use awqc_cuda as cuda;
pub use awqc_exec as exec;
pub use awqc_frontends as frontends;
pub use awqc_ir as ir;
pub use awqc_passes as passes;

mod allocation;
pub mod bandwidth;
pub mod bench;
pub mod burn;
pub mod calibration;
pub mod chat;
mod cli;
pub mod compile;
pub mod device;
pub mod engine;
pub mod evaluate;
pub mod failure;
mod files;
pub mod generate;
pub mod images;
pub mod interrupt;
pub mod logits;
pub mod metrics;
pub mod model;
pub mod order;
pub mod products;
pub mod progress;
pub mod resume;
mod rss;
pub mod sample;
pub mod size;
pub mod standard;
pub mod statistics;
pub mod study;
pub mod target;
pub mod tokens;
mod tuning;
pub mod watch;

pub use cli::main;
