//! Runs verified modules on any burn backend: the reference meaning of the IR, calibration, the realisation of weight
//! expressions, and the emitters of the targets that need no kernels of their own.

mod calibrate;
mod chain;
pub mod control;
pub mod coverage;
pub mod device;
pub mod emit;
pub mod executor;
pub mod eye;
mod gradient;
mod gram;
pub mod host;
pub mod interp;
pub mod layout;
mod memo;
pub mod memory;
pub mod realize;
pub mod sensitivity;
pub mod session;
pub mod stream;
mod synthetic;
pub mod tune;

pub use calibrate::{Calibrate, Rows, Sums};
pub use chain::rowwise;
pub use control::{Control, Progress};
pub use executor::{BurnExecutor, HostExecutor};
pub use eye::{Eye, Observer};
pub use host::Host;
pub use interp::{Caches, ExecBackend, Interpreter, Val, Weights};
pub use memory::MemorySource;
pub use realize::{Realized, realize};
pub use sensitivity::sensitivity;
pub use session::{Logits, Session};
pub use stream::{Chunk, Piece, Ready, stream};
