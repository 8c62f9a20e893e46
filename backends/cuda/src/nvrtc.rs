//! CUDA text to PTX and cubin with NVRTC, loaded at run time where it can be found. It needs no device.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;
use serde::{Deserialize, Serialize};

use crate::CudaError;
use crate::arch::Arch;
use crate::emit::Source;
use crate::library::functions;

type Program = *mut c_void;
type Status = c_int;

/// NVRTC and the headers that it reads.
pub struct Nvrtc {
    functions: Functions,
    includes: Vec<PathBuf>,
    version: (i32, i32),
}

/// What NVRTC makes of a kernel.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Text that later drivers and architectures can still compile.
    pub ptx: Vec<u8>,
    /// Machine code of the architecture.
    pub cubin: Vec<u8>,
    /// What the machine code takes.
    pub resources: Resources,
}

/// What a kernel takes of a multiprocessor, as `ptxas` reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// The kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes that a thread stores because it ran out of registers.
    pub spill_stores: usize,
    /// Bytes that it loads again.
    pub spill_loads: usize,
    /// Bytes of the stack of a thread.
    pub stack: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: usize,
    /// Warps that a multiprocessor holds at once, limited by registers, shared memory and warps.
    pub warps_per_multiprocessor: usize,
}

functions! {
    Functions, |symbol| CudaError::NoNvrtc(format!("the library lacks {symbol}: version 11.2 or later is needed"));
    version = "nvrtcVersion": fn(*mut c_int, *mut c_int);
    create = "nvrtcCreateProgram": fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    destroy = "nvrtcDestroyProgram": fn(*mut Program);
    compile = "nvrtcCompileProgram": fn(Program, c_int, *const *const c_char);
    log_size = "nvrtcGetProgramLogSize": fn(Program, *mut usize);
    log = "nvrtcGetProgramLog": fn(Program, *mut c_char);
    ptx_size = "nvrtcGetPTXSize": fn(Program, *mut usize);
    ptx = "nvrtcGetPTX": fn(Program, *mut c_char);
    cubin_size = "nvrtcGetCUBINSize": fn(Program, *mut usize);
    cubin = "nvrtcGetCUBIN": fn(Program, *mut c_char);
}

/// Names of the library.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"];

impl Nvrtc {
    /// NVRTC in one of `folders`, or where the system keeps libraries. A folder is that of the library itself, or of a
    /// CUDA toolkit, or the folder `nvidia` that NVIDIA's packages for Python share.
    ///
    /// # Errors
    /// When it is nowhere, or its headers are not beside it; the message says what would help.
    pub fn open(folders: &[PathBuf]) -> Result<Self, CudaError> {
        let below = ["", "lib64", "lib", "cuda_nvrtc/lib", "cu13/lib", "targets/x86_64-linux/lib"];
        let own = folders.iter().flat_map(|f| below.map(|b| f.join(b)));
        let usual = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(PathBuf::from);
        let places: Vec<PathBuf> =
            own.chain(usual).flat_map(|f| NAMES.map(|n| f.join(n))).filter(|p| p.is_file()).collect();
        let bare = NAMES.map(PathBuf::from);
        for path in places.iter().chain(&bare) {
            // SAFETY: NVRTC's initialisers have no preconditions.
            let Ok(library) = (unsafe { Library::new(path) }) else { continue };
            let functions = Functions::find(library)?;
            let includes = includes(path, folders);
            if !includes.iter().any(|i| i.join("cuda_fp16.h").is_file()) {
                return Err(CudaError::NoNvrtc(format!("{} has no cuda_fp16.h beside it", path.display())));
            }
            let (mut major, mut minor) = (0, 0);
            // SAFETY: pointers to local variables.
            unsafe { (functions.version)(&mut major, &mut minor) };
            return Ok(Self { functions, includes, version: (major, minor) });
        }
        Err(CudaError::NoNvrtc("install a CUDA toolkit, or the Python packages nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12 and nvidia-cuda-cccl-cu12".into()))
    }

    /// Its version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a kernel.
    ///
    /// # Errors
    /// When NVRTC refuses it; the message holds its log.
    pub fn compile(&self, source: &Source, arch: &Arch) -> Result<Compiled, CudaError> {
        let ptx = self.run(&source.name, &source.text, arch, &format!("compute_{}", arch.sm), false)?.0;
        let (cubin, log) = self.run(&source.name, &source.text, arch, &arch.name(), true)?;
        Ok(Compiled { ptx, cubin, resources: resources(source, arch, &log) })
    }

    /// The machine code of a kernel whose text was written by an earlier compile.
    ///
    /// # Errors
    /// As [`Nvrtc::compile`].
    pub fn compile_text(&self, name: &str, text: &str, arch: &Arch) -> Result<Vec<u8>, CudaError> {
        Ok(self.run(name, text, arch, &arch.name(), true)?.0)
    }

    fn run(
        &self,
        name: &str,
        code: &str,
        arch: &Arch,
        target: &str,
        binary: bool,
    ) -> Result<(Vec<u8>, String), CudaError> {
        let refused = |log: String| CudaError::Nvrtc { kernel: name.into(), arch: arch.name(), log };
        let text = |s: &str| CString::new(s).map_err(|_| refused("the text holds a zero".into()));
        let mut options = vec![text(&format!("--gpu-architecture={target}"))?, text("--std=c++17")?];
        if binary {
            options.push(text("--ptxas-options=-v")?);
        }
        for include in &self.includes {
            options.push(text(&format!("--include-path={}", include.display()))?);
        }
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let (code, name) = (text(code)?, text(&format!("{name}.cu"))?);
        let f = &self.functions;
        let mut program: Program = ptr::null_mut();
        // SAFETY: strings end in zeros and live through the calls; results are read into buffers of the size that NVRTC
        // tells; the program is destroyed once.
        unsafe {
            if (f.create)(&mut program, code.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()) != 0 {
                return Err(refused("no program could be made".into()));
            }
            let status = (f.compile)(program, pointers.len() as c_int, pointers.as_ptr());
            let log = read(program, f.log_size, f.log);
            let out = match (status, binary) {
                (0, true) => read(program, f.cubin_size, f.cubin),
                (0, false) => read(program, f.ptx_size, f.ptx),
                (_, _) => Vec::new(),
            };
            (f.destroy)(&mut program);
            let log = CStr::from_bytes_until_nul(&log).map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
            if status != 0 || out.is_empty() {
                return Err(refused(log));
            }
            Ok((out, log))
        }
    }
}

/// # Safety
/// `size` and `get` are functions of NVRTC for `program`, which exists.
unsafe fn read(
    program: Program,
    size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
) -> Vec<u8> {
    let mut bytes = 0;
    // SAFETY: as the caller says; the buffer has the size that the library wants.
    unsafe {
        if size(program, &mut bytes) != 0 {
            return Vec::new();
        }
        let mut out = vec![0u8; bytes];
        if get(program, out.as_mut_ptr().cast()) == 0 { out } else { Vec::new() }
    }
}

/// Folders of headers that go with a library.
fn includes(library: &Path, folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = folders.to_vec();
    roots.extend(library.ancestors().skip(1).take(4).map(Path::to_path_buf));
    roots.extend(["/usr/local/cuda", "/opt/cuda", "/usr"].map(PathBuf::from));
    let below =
        ["include", "cuda_runtime/include", "cuda_cccl/include", "cu13/include", "targets/x86_64-linux/include"];
    // Since version 13, toolkits keep `nv/target` in a folder of its own.
    let all = roots.iter().flat_map(|r| below.map(|b| r.join(b))).flat_map(|p| [p.join("cccl"), p]);
    let mut out: Vec<PathBuf> = Vec::new();
    for path in all.filter(|p| p.join("cuda_fp16.h").is_file() || p.join("nv/target").is_file()) {
        if !out.contains(&path) {
            out.push(path);
        }
    }
    out
}

/// The numbers in what `ptxas` prints for the one kernel of a text.
fn resources(source: &Source, arch: &Arch, log: &str) -> Resources {
    let before = |word: &str| {
        let at = log.find(word)?;
        log[..at].split_whitespace().next_back()?.parse::<usize>().ok()
    };
    let registers = before(" registers").unwrap_or(0);
    let warps = source.threads as usize / 32;
    // Registers are given out to warps in units of 256.
    let by_registers = match (registers * 32).next_multiple_of(256) {
        0 => arch.warps_sm,
        each => arch.registers_sm / each,
    };
    let blocks = [
        arch.warps_sm / warps.max(1),
        by_registers / warps.max(1),
        arch.shared_bytes_sm / (source.shared_bytes + 1024),
    ];
    Resources {
        kernel: source.name.clone(),
        registers,
        spill_stores: before(" bytes spill stores").unwrap_or(0),
        spill_loads: before(" bytes spill loads").unwrap_or(0),
        stack: before(" bytes stack frame").unwrap_or(0),
        threads: source.threads,
        shared_bytes: source.shared_bytes,
        warps_per_multiprocessor: blocks.into_iter().min().unwrap_or(0) * warps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ptxas_says() {
        let log = "ptxas info    : 0 bytes gmem\nptxas info    : Function properties for k\nptxas         .     16 bytes \
                   stack frame, 24 bytes spill stores, 32 bytes spill loads\nptxas info    : Used 128 registers, used 1 \
                   barriers, 392 bytes cmem[0]\n";
        let source = Source { name: "k".into(), text: String::new(), threads: 256, shared_bytes: 20480, args: 1 };
        let r = resources(&source, Arch::find(89).unwrap(), log);
        assert_eq!((r.registers, r.stack, r.spill_stores, r.spill_loads), (128, 16, 24, 32));
        assert_eq!(r.warps_per_multiprocessor, 16, "64 Ki registers hold 16 warps of 128");
    }
}
