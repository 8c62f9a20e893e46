//! What can go wrong.

use awqc_passes::ExecError;

use crate::arch::Arch;

/// Why a module could not be compiled for CUDA, or not be run.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No kernels for this architecture.
    #[error("there are no kernels for sm_{0}; there are for {known}", known = Arch::names())]
    Arch(u32),
    /// The module uses something that no kernel covers. The message names the region and the op or weight.
    #[error("{0}")]
    Unsupported(String),
    /// A kernel could not be written: a defect of this program.
    #[error("kernel {kernel}: {why}")]
    Emit {
        /// The kernel.
        kernel: String,
        /// What the code generator said.
        why: String,
    },
    /// NVRTC is not there.
    #[error("NVRTC was not found: {0}")]
    NoNvrtc(String),
    /// NVRTC refused a kernel.
    #[error("NVRTC could not compile {kernel} for {arch}: {log}")]
    Nvrtc {
        /// The kernel.
        kernel: String,
        /// `sm_89`
        arch: String,
        /// What it said.
        log: String,
    },
    /// No CUDA driver.
    #[error("no CUDA driver was found ({0})")]
    NoDriver(String),
    /// A driver, but no device.
    #[error("the CUDA driver finds no device")]
    NoDevice,
    /// The driver lacks something or is too old.
    #[error("the CUDA driver is too old: {0}")]
    OldDriver(String),
    /// The device is of another architecture than the kernels.
    #[error("the kernels are for {kernels}, this device ({device}) is sm_{}{}", capability.0, capability.1)]
    OtherArch {
        /// What the artefact was compiled for.
        kernels: String,
        /// The device's name.
        device: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// Device memory is too small.
    #[error("{what} needs {needed} bytes of device memory, {free} are free")]
    Memory {
        /// What was to be allocated.
        what: String,
        /// Its bytes.
        needed: usize,
        /// What the device has left.
        free: usize,
    },
    /// The driver reported an error.
    #[error("{call}: {name} ({text})")]
    Driver {
        /// The function.
        call: &'static str,
        /// The error's name.
        name: String,
        /// What the driver says about it.
        text: String,
    },
    /// The artefact's kernels are damaged or of another version.
    #[error("{0}")]
    Artefact(String),
    /// More positions than the caches hold.
    #[error("the sequence needs {needed} positions, there is room for {room}")]
    Context {
        /// Positions wanted.
        needed: usize,
        /// Positions that the caches hold.
        room: usize,
    },
    /// A token id or position that is outside its table.
    #[error("{id} is not in an embedding table of {rows} rows")]
    Index {
        /// The id.
        id: i64,
        /// Rows of the table.
        rows: usize,
    },
    /// Images that the model, or the text, has no place for.
    #[error("{0}")]
    Images(String),
    /// A kernel on the device computes something else than the processor.
    #[error(
        "the device computes {what} wrongly: it is off by {error:.1e} of the largest result, {bound:.0e} is allowed"
    )]
    Wrong {
        /// What was computed.
        what: String,
        /// The largest difference, relative to the largest result.
        error: f64,
        /// What it may be.
        bound: f64,
    },
    /// A weight could not be read.
    #[error(transparent)]
    Exec(#[from] ExecError),
}
