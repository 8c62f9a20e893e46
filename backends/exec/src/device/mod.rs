//! The reference meaning on CUDA devices: the interpreter on burn-cuda, behind functions that are not generic, so that
//! no other crate pays for compiling burn's kernels. Without the feature `burn-cuda` these say that they are missing.

#[cfg(feature = "burn-cuda")]
mod cuda;
#[cfg(feature = "burn-cuda")]
mod guard;
#[cfg(feature = "burn-cuda")]
mod probe;
#[cfg(any(feature = "burn-cuda", test))]
mod sums;

use std::sync::Arc;

use awqc_ir::{TensorSource, Verified};
use awqc_passes::{ExecError, Executor, Tensor};

use crate::control::Control;
use crate::session::Logits;

/// Why the reference meaning cannot run on a CUDA device.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// The feature `burn-cuda` is off.
    #[error("this awqc was built without burn-cuda")]
    NotBuilt,
    /// There is no driver.
    #[error("the CUDA driver (libcuda) was not found")]
    NoDriver,
    /// The driver fails.
    #[error("the CUDA driver fails: {0}")]
    Driver(String),
    /// The driver knows no device.
    #[error("the CUDA driver finds no device")]
    NoDevice,
    /// burn-cuda compiles its kernels when they are launched.
    #[error("NVRTC, NVIDIA's run-time compiler (libnvrtc), was not found; burn-cuda compiles its kernels with it")]
    NoNvrtc,
    /// NVRTC needs them for burn's kernels.
    #[error("CUDA's headers were not found: there is no {0}")]
    NoHeaders(String),
    /// Loading the model failed.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

/// A model on a device, continuing one sequence: what [`crate::Session`] is on the host.
pub trait DeviceSession {
    /// As [`crate::Session::forward`].
    ///
    /// # Errors
    /// As there, and when the device fails.
    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, ExecError>;

    /// As [`crate::Session::see`].
    ///
    /// # Errors
    /// As there, and when the device fails.
    fn see(&mut self, pixels: Tensor) -> Result<(), ExecError>;

    /// Forgets all earlier positions, and the images.
    fn reset(&mut self);
}

/// Whether this machine has what the functions below need; nothing is started.
///
/// # Errors
/// What is missing.
pub fn probe() -> Result<(), DeviceError> {
    #[cfg(feature = "burn-cuda")]
    return probe::probe();
    #[cfg(not(feature = "burn-cuda"))]
    Err(DeviceError::NotBuilt)
}

/// An executor on the first CUDA device, see [`crate::HostExecutor`]; with token windows at the entry of the module
/// unless there are none.
///
/// # Errors
/// As [`probe`], and when the device fails.
pub fn executor(
    source: Arc<dyn TensorSource>,
    control: Control,
    windows: &[Vec<i32>],
) -> Result<Box<dyn Executor>, DeviceError> {
    probe()?;
    #[cfg(feature = "burn-cuda")]
    return Ok(cuda::executor(source, control, windows)?);
    #[cfg(not(feature = "burn-cuda"))]
    {
        let _ = (source, control, windows);
        Err(DeviceError::NotBuilt)
    }
}

/// A session on the first CUDA device: all weights as f32, and a cache for each attention.
///
/// # Errors
/// As [`probe`], when a tensor cannot be read, and when the device fails.
pub fn session(module: Verified<'_>, source: &dyn TensorSource) -> Result<Box<dyn DeviceSession>, DeviceError> {
    probe()?;
    #[cfg(feature = "burn-cuda")]
    return Ok(cuda::session(module, source)?);
    #[cfg(not(feature = "burn-cuda"))]
    {
        let _ = (module, source);
        Err(DeviceError::NotBuilt)
    }
}
