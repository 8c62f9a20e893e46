//! CUDA artefacts: writing the kernels beside the weights, and bringing them to a device.

use std::path::{Path, PathBuf};

use awqc_cuda::arch::Arch;
use awqc_cuda::driver::Device;
use awqc_cuda::nvrtc::Resources;
use awqc_cuda::plan::Plan;
use awqc_cuda::{CudaError, Lowered, Nvrtc, Session, lower};
use awqc_ir::verify::verify;

use crate::failure::{Exit, Failure};
use crate::files;
use crate::model::Model;
use crate::progress::{Progress, say};

/// The folder of the kernels in an artefact.
const KERNELS: &str = "kernels";
/// The launch plan in that folder.
const PLAN: &str = "plan.json";
/// What the kernels take of a device.
const RESOURCES: &str = "resources.json";
/// Names folders in which NVRTC is looked for.
pub const NVRTC: &str = "AWQC_NVRTC";

/// Writes the kernels of the artefact in `folder`: text and plan always, PTX and machine code where NVRTC is found.
/// Returns what people should know.
///
/// # Errors
/// When a kernel does not cover the module, NVRTC refuses one, or a file cannot be written.
pub fn write_kernels(folder: &Path, sm: u32, folders: &[PathBuf], quiet: bool) -> Result<Vec<String>, Failure> {
    let arch = Arch::find(sm)?;
    let model = Model::open(folder)?;
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::Check, d))?;
    let Lowered { plan, kernels, remarks: mut notes } = lower(module, model.source.as_ref(), arch)?;
    let to = folder.join(KERNELS);
    std::fs::create_dir(&to).map_err(|e| Failure::io(&to, &e))?;
    for kernel in &kernels {
        files::write(&to.join(format!("{}.cu", kernel.name)), kernel.text.as_bytes())?;
    }
    files::write(&to.join(PLAN), &json(&plan)?)?;
    match self::nvrtc(folders) {
        Ok(nvrtc) => {
            let mut progress = Progress::new("kernels", kernels.len() as u64, quiet);
            let mut resources: Vec<Resources> = Vec::new();
            for kernel in &kernels {
                let compiled = nvrtc.compile(kernel, arch)?;
                files::write(&to.join(format!("{}.ptx", kernel.name)), &compiled.ptx)?;
                files::write(&to.join(format!("{}.cubin", kernel.name)), &compiled.cubin)?;
                if compiled.resources.spill_stores > 0 {
                    let spilled = compiled.resources.spill_stores;
                    notes.push(format!("{} spills {spilled} bytes of registers to memory", kernel.name));
                }
                resources.push(compiled.resources);
                progress.step(&kernel.name);
            }
            progress.finish();
            files::write(&to.join(RESOURCES), &json(&resources)?)?;
        }
        Err(CudaError::NoNvrtc(why)) => {
            // Who names a folder expects more than a note.
            if let Some(named) = std::env::var_os(NVRTC).filter(|named| !named.is_empty()) {
                say(&format!("warning: {NVRTC}={}: no usable NVRTC was found there", Path::new(&named).display()));
            }
            notes.push(format!(
                "NVRTC was not found, so the artefact has the kernels' text but no machine code; the device's machine \
                 needs NVRTC then ({why}; --nvrtc or {NVRTC} name its folder)"
            ));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(notes)
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec_pretty(value).map_err(|e| Failure::new(Exit::Failed, e))
}

/// NVRTC in one of `folders`, of those that the environment names, or where it is usually installed.
///
/// # Errors
/// When it is nowhere.
pub fn nvrtc(folders: &[PathBuf]) -> Result<Nvrtc, CudaError> {
    let named = std::env::var_os(NVRTC).map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>());
    Nvrtc::open(&folders.iter().cloned().chain(named.unwrap_or_default()).collect::<Vec<_>>())
}

/// Whether a model has kernels for a device.
pub fn has_kernels(model: &Model) -> bool {
    model.path.join(KERNELS).join(PLAN).is_file()
}

/// A CUDA artefact on the machine's device, with room for `context` positions.
///
/// # Errors
/// When there is no device, it is of another architecture, or it has too little memory.
pub fn session(model: &Model, context: usize) -> Result<Session, Failure> {
    let folder = model.path.join(KERNELS);
    let plan = read_plan(&folder.join(PLAN))?;
    let device = Device::open(None)?;
    let arch = Arch::find(plan.arch)?;
    let mut nvrtc = None;
    let image = |name: &str| -> Result<Vec<u8>, CudaError> {
        for suffix in ["cubin", "ptx"] {
            let path = folder.join(format!("{name}.{suffix}"));
            match std::fs::read(&path) {
                Ok(bytes) => return Ok(bytes),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(CudaError::Artefact(format!("{}: {e}", path.display()))),
            }
        }
        let path = folder.join(format!("{name}.cu"));
        let text = std::fs::read_to_string(&path)
            .map_err(|e| CudaError::Artefact(format!("{}: {e}: compile the model again", path.display())))?;
        let nvrtc = match &nvrtc {
            Some(nvrtc) => nvrtc,
            None => nvrtc.insert(self::nvrtc(&[])?),
        };
        nvrtc.compile_text(name, &text, arch)
    };
    Ok(Session::new(plan, model.source.as_ref(), image, device, context)?)
}

fn read_plan(path: &Path) -> Result<Plan, Failure> {
    let bytes = std::fs::read(path).map_err(|e| Failure::io(path, &e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Failure::new(Exit::BadInput, format!("{}: {e}", path.display())).help("compile the model again"))
}

/// Gigabytes a second that a device copies from one place of its memory to another: what is read plus what is written.
///
/// # Errors
/// When the device fails.
pub fn bandwidth(device: &Device) -> Result<f64, Failure> {
    const BYTES: usize = 256 << 20;
    const COPIES: usize = 4;
    let (from, to) = (device.alloc("a probe", BYTES)?, device.alloc("a probe", BYTES)?);
    let copy = || device.copy((&from, 0), (&to, 0), BYTES);
    device.time(copy)?;
    let mut best = 0f64;
    for _ in 0..3 {
        let seconds = device.time(|| (0..COPIES).try_for_each(|_| copy()))?;
        best = best.max(2e-9 * (COPIES * BYTES) as f64 / seconds);
    }
    Ok(best)
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Self {
        let elsewhere = "run the artefact on a machine with an NVIDIA GPU and its driver; `run` and `eval` also take \
                         --device host, which decodes the weights and is slow";
        match error {
            CudaError::Exec(e) => e.into(),
            CudaError::Arch(_) | CudaError::Unsupported(_) => Self::new(Exit::Unsupported, error),
            CudaError::NoDriver(_) | CudaError::NoDevice => Self::new(Exit::Unsupported, error).help(elsewhere),
            CudaError::OldDriver(_) => Self::new(Exit::Unsupported, error).help("install a driver of CUDA 12 or later"),
            CudaError::OtherArch { capability: (major, minor), .. } => {
                let known = Arch::find(10 * major + minor).is_ok();
                let help =
                    if known { format!("compile with --target cuda-sm{major}{minor}") } else { elsewhere.into() };
                Self::new(Exit::Unsupported, error).help(help)
            }
            CudaError::NoNvrtc(_) => Self::new(Exit::Unsupported, error)
                .help(format!("name its folder with --nvrtc (compile) or in {NVRTC}")),
            CudaError::Memory { .. } => Self::new(Exit::Memory, error)
                .help("make room for fewer positions with --ctx, or compile the model to fewer bits"),
            CudaError::Artefact(_) | CudaError::Images(_) => Self::new(Exit::BadInput, error),
            CudaError::Context { .. } => {
                Self::new(Exit::Usage, error).help("make room with --ctx, or give a shorter prompt")
            }
            CudaError::Wrong { .. } => Self::new(Exit::Check, error)
                .help("this is a defect of the program, its compiler or the device: please report it"),
            CudaError::Index { .. } => Self::new(Exit::BadInput, error).help("is the tokenizer that of this model?"),
            CudaError::Emit { .. } | CudaError::Nvrtc { .. } | CudaError::Driver { .. } => {
                Self::new(Exit::Failed, error)
            }
        }
    }
}
