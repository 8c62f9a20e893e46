//! Ctrl-C and requests to terminate: the first asks the work to stop at the next safe place, the second ends the
//! process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::{Exit, Failure};

/// A flag that Ctrl-C sets. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// A flag that follows Ctrl-C from now on.
    pub fn on_ctrl_c() -> Self {
        let flag = Self::default();
        let shared = flag.clone();
        // A second handler cannot be set in one process: the library user who did keeps theirs.
        drop(ctrlc::set_handler(move || {
            if shared.0.swap(true, Ordering::SeqCst) {
                std::process::exit(Exit::Interrupted as i32);
            }
        }));
        flag
    }

    /// The flag itself, for long work elsewhere.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Fails once the flag is set.
    ///
    /// # Errors
    /// When the user asked to stop.
    pub fn check(&self) -> Result<(), Failure> {
        if self.0.load(Ordering::SeqCst) { Err(Failure::interrupted()) } else { Ok(()) }
    }
}
