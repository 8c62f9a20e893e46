//! How a caller watches and stops long work.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use awqc_ir::RegionName;
use awqc_passes::ExecError;

/// How far a stream of windows has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The region at work.
    pub region: RegionName,
    /// Windows that have passed it.
    pub done: usize,
    /// Windows in all.
    pub windows: usize,
}

/// A progress callback.
type Report = dyn Fn(&Progress) + Send + Sync;

/// The interrupt flag and the progress callback of a caller. The default neither stops nor reports.
#[derive(Clone, Default)]
pub struct Control {
    interrupt: Option<Arc<AtomicBool>>,
    progress: Option<Arc<Report>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("interrupt", &self.interrupt)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

impl Control {
    /// Neither stops nor reports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Work stops with [`ExecError::Interrupted`] soon after the flag becomes true.
    #[must_use]
    pub fn with_interrupt(mut self, flag: Arc<AtomicBool>) -> Self {
        self.interrupt = Some(flag);
        self
    }

    /// `report` is called after every few windows, on the thread that started the work.
    #[must_use]
    pub fn with_progress(mut self, report: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(report));
        self
    }

    /// Fails if the caller asked to stop.
    ///
    /// # Errors
    /// [`ExecError::Interrupted`].
    pub fn check(&self) -> Result<(), ExecError> {
        match &self.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(ExecError::Interrupted),
            Some(_) | None => Ok(()),
        }
    }

    pub(crate) fn report(&self, region: &RegionName, done: usize, windows: usize) {
        if let Some(report) = &self.progress {
            report(&Progress { region: region.clone(), done, windows });
        }
    }
}
