//! The reference meaning on a CUDA device, through burn-cuda: models without kernels of their own, and calibration.

use std::sync::Arc;

use awqc_cuda::driver::Device;
use awqc_exec::device::{self, DeviceError, DeviceSession};
use awqc_exec::{Control, HostExecutor, Logits};
use awqc_ir::verify::verify;
use awqc_ir::{Module, Op, Operand, Region, TensorSource};
use awqc_passes::{Executor, Tensor};

use crate::bench::Subject;
use crate::device::nvrtc;
use crate::engine::{Engine, RunsOn};
use crate::failure::{Exit, Failure};
use crate::model::Model;

/// Where activations are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProfileOn {
    /// On the processor
    #[default]
    Host,
    /// On the CUDA device, through burn-cuda
    Cuda,
}

impl ProfileOn {
    /// What the command line and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cuda => "cuda",
        }
    }

    /// The name of the device, if one is asked for.
    ///
    /// # Errors
    /// When it cannot be had; nothing has been started then.
    pub fn check(self) -> Result<Option<String>, Failure> {
        match self {
            Self::Host => Ok(None),
            Self::Cuda => {
                probe()?;
                Ok(Some(Device::open(None)?.name().to_owned()))
            }
        }
    }

    /// An executor with these windows at the entry of the module.
    ///
    /// # Errors
    /// When there is no window, or the device fails.
    pub fn calibrated(
        self,
        source: Arc<dyn TensorSource>,
        control: Control,
        windows: &[Vec<i32>],
    ) -> Result<Box<dyn Executor>, Failure> {
        match self {
            Self::Host => Ok(Box::new(HostExecutor::new(source).with_control(control).with_calibration(windows)?)),
            Self::Cuda => Ok(device::executor(source, control, windows)?),
        }
    }
}

/// Whether the device can be had.
fn probe() -> Result<(), Failure> {
    // cudarc opens the library by its bare name alone, and gets one that is open already: so the folders that are
    // searched for the packed kernels' compiler serve burn's, too. It stays open to the end.
    if let Ok(nvrtc) = nvrtc(&[]) {
        std::mem::forget(nvrtc);
    }
    Ok(device::probe()?)
}

/// A model on the device.
pub struct Burn {
    session: Box<dyn DeviceSession>,
    vocabulary: usize,
    bytes_per_token: usize,
}

/// `model` on the device, all weights decoded to f32.
///
/// # Errors
/// When the module is invalid, a tensor cannot be read, or the device cannot be had or has too little memory.
pub fn session(model: &Model) -> Result<Burn, Failure> {
    probe()?;
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    Ok(Burn {
        session: device::session(module, model.source.as_ref())?,
        vocabulary: model.vocabulary().and_then(|v| usize::try_from(v).ok()).unwrap_or(0),
        bytes_per_token: bytes_per_token(&model.module),
    })
}

/// Bytes of f32 weights that are read for every token: all but the embeddings' tables, and of experts those that a
/// token goes to.
fn bytes_per_token(module: &Module) -> usize {
    let of = |region: &Region| {
        let tables = region.nodes().filter(|(_, n)| matches!(n.op, Op::Embedding(_)));
        let tables: Vec<Operand> = tables.flat_map(|(_, n)| n.operands.clone()).collect();
        let chosen = region.nodes().find_map(|(_, n)| if let Op::TopK(t) = &n.op { Some(t.k) } else { None });
        let read = |id| {
            let shape: Vec<u64> = region.weight(id).ty.shape.iter().filter_map(|d| d.as_const()).collect();
            let all = shape.iter().product::<u64>();
            match (shape.as_slice(), chosen) {
                ([experts, _, _], Some(k)) => all / (*experts).max(1) * k.min(*experts),
                (_, _) => all,
            }
        };
        let used = region.used_weights().into_iter().filter(|w| !tables.contains(&Operand::Weight(*w)));
        used.map(read).sum::<u64>()
    };
    let (_, text) = module.eye_and_text();
    4 * text.iter().map(of).sum::<u64>() as usize
}

impl Engine for Burn {
    fn runs_on(&self) -> RunsOn {
        RunsOn { isa: "burn-cuda".into(), ..RunsOn::reference() }
    }

    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, Failure> {
        Ok(self.session.forward(ids, logits)?)
    }

    fn see(&mut self, pixels: Tensor) -> Result<(), Failure> {
        Ok(self.session.see(pixels)?)
    }

    fn reset(&mut self) {
        self.session.reset();
    }
}

impl Subject for Burn {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn bytes_per_token(&self) -> usize {
        self.bytes_per_token
    }

    fn reset(&mut self) {
        self.session.reset();
    }

    fn run(&mut self, ids: &[i32]) -> Result<(), Failure> {
        self.session.forward(ids, Logits::Last)?;
        Ok(())
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let help = match error {
            DeviceError::Exec(e) => return e.into(),
            DeviceError::NotBuilt => "cargo build --release --features burn-cuda",
            DeviceError::NoDriver | DeviceError::NoDevice | DeviceError::Driver(_) => {
                "run it on a machine with an NVIDIA GPU and its driver, or on the processor"
            }
            DeviceError::NoNvrtc => "install the CUDA toolkit, or name NVRTC's folder in AWQC_NVRTC",
            DeviceError::NoHeaders(_) => "install the CUDA toolkit, or name its folder in CUDA_PATH",
        };
        Self::new(Exit::Unsupported, error).help(help)
    }
}

#[cfg(all(test, not(feature = "burn-cuda")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_burn_says_so() {
        let failure = ProfileOn::Cuda.check().expect_err("it was not built");
        assert_eq!(failure.exit, Exit::Unsupported);
        assert!(
            failure.to_string().contains("built without burn-cuda\nhelp: cargo build --release --features burn-cuda")
        );
    }
}
