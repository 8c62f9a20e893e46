//! Runs modules on CPUs, with kernels that work on packed low-bit weights.
//!
//! A module is *lowered* once: fused calls are opened, values get places in one arena, and its ops are gathered in
//! stages (a matrix product, an attention, or a run of steps that treat each token by itself). A team of threads walks
//! through the stages in step; nothing is allocated for a token, but for the lists by which experts are chosen. See
//! [`Session`].
//!
//! Products with packed weights are in [`kernels`]: one scalar version that says what is right, and versions for AVX2,
//! AVX-512 and NEON that give the same bits and are chosen by what the machine has. With AMX, prompts are multiplied in
//! bf16.

mod arena;
mod cache;
mod dense;
mod experts;
pub mod kernels;
mod linear;
mod lower;
mod memory;
mod pool;
mod program;
mod session;

pub use cache::CacheNumbers;
pub use kernels::Isa;
pub use linear::{Activations, Operand, multiply};
pub use lower::check;
pub use memory::{Pages, Room, prefetch};
pub use pool::{Member, Pool};
pub use session::{Options, Session};

/// Why a module cannot be run here.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A weight cannot be read.
    #[error(transparent)]
    Exec(#[from] awqc_passes::ExecError),
    /// An op in a form that this back end does not know.
    #[error("{0}")]
    Unsupported(String),
    /// An instruction set that the machine lacks.
    #[error("this machine has no {0}")]
    Feature(&'static str),
    /// Products in bf16 with another instruction set.
    #[error("products in bf16 are made with amx, not with {0}")]
    Bf16(&'static str),
    /// Room that the system does not give.
    #[error("there is no memory for {what}: {bytes} bytes")]
    Memory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// A pass without tokens.
    #[error("there are no tokens to run")]
    Empty,
    /// A sequence that is longer than the caches.
    #[error("{needed} positions are needed, there is room for {room}")]
    Context {
        /// Positions that the sequence would have.
        needed: usize,
        /// Positions that there is room for.
        room: usize,
    },
    /// The flag of [`Session::with_interrupt`] was set.
    #[error("interrupted")]
    Interrupted,
    /// Images that the model, or the text, has no place for.
    #[error("{0}")]
    Images(String),
    /// A token or position that a table does not have.
    #[error("index {id} is outside the embedding table of {rows} rows")]
    Index {
        /// The index.
        id: i64,
        /// Rows of the table.
        rows: usize,
    },
}
