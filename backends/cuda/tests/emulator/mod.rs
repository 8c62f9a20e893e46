//! Kernels on a CPU: their CUDA text, compiled by the system's C++ compiler against a small imitation of what CUDA
//! provides (`device.h`), behind an imitation of the CUDA driver (`driver.cpp`). The crate's own driver code loads it
//! like a real one. Kernels are linked in, or compiled when they are wanted by an imitation of NVRTC (`nvrtc.cpp`).

//!
//! With `AWQC_GPU` set, kernels run on the machine's device instead, compiled by NVRTC (`device.rs`).

mod device;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use awqc_cuda::CudaError;
use awqc_cuda::driver::Device;
use awqc_cuda::emit::Source;

pub(crate) use device::arch;
#[allow(unused_imports, reason = "only one of the test binaries wants it")]
pub(crate) use device::on_device;

/// A driver that knows some kernels. The folder with it is removed when this is dropped.
pub(crate) struct Emulator {
    dir: tempfile::TempDir,
    /// Machine code by kernel, for the machine's device.
    images: Option<BTreeMap<String, Vec<u8>>>,
}

impl Emulator {
    /// Compiles the kernels, for the machine's device if the tests are to run on it.
    pub(crate) fn build<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> Self {
        match on_device() {
            true => Self { dir: tempfile::tempdir().expect("a folder"), images: Some(device::compile(kernels)) },
            false => Self::emulated(kernels),
        }
    }

    /// The emulator in any case.
    pub(crate) fn emulated<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("kernels.cpp"), unit(kernels)).expect("kernels.cpp");
        let driver = own().join("driver.cpp");
        compile(&dir, &[&driver], "libcuda.so.1");
        Self { dir, images: None }
    }

    /// Puts the imitation of NVRTC beside the driver.
    #[allow(dead_code, reason = "only one of the test binaries wants it")]
    pub(crate) fn with_nvrtc(self) -> Self {
        compile(&self.dir, &[&own().join("nvrtc.cpp")], "libnvrtc.so.12");
        std::fs::create_dir(self.folder().join("include")).expect("a folder");
        for header in ["cuda_fp16.h", "cuda_runtime.h"] {
            std::fs::write(self.folder().join("include").join(header), "").expect("a header");
        }
        // The names by which burn-cuda looks for them first: a machine may have real ones.
        for (library, name) in [("libcuda.so.1", "libcuda.so"), ("libnvrtc.so.12", "libnvrtc.so")] {
            std::os::unix::fs::symlink(library, self.folder().join(name)).expect("a link");
        }
        let header = self.folder().join("device.h");
        std::fs::copy(own().join("device.h"), &header).expect("a header");
        // Compiled once for all kernels, by the flags of `nvrtc.cpp`: by others it would not be used.
        let flags =
            ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-w", "-fPIC"];
        let mut compiler = Command::new("g++");
        let done =
            compiler.args(flags).args(["-x", "c++-header"]).arg(&header).arg("-o").arg(header.with_extension("h.gch"));
        assert!(done.status().expect("g++").success(), "the header compiles");
        self
    }

    /// The device that runs the kernels.
    pub(crate) fn device(&self) -> Device {
        match self.images {
            Some(_) => Device::open(None).expect("AWQC_GPU is set, so a device is needed"),
            None => Device::open(Some(&self.library())).expect("the emulator"),
        }
    }

    /// What the driver loads for a kernel: nothing where it is linked in.
    pub(crate) fn image(&self, kernel: &str) -> Result<Vec<u8>, CudaError> {
        match &self.images {
            None => Ok(Vec::new()),
            Some(images) => {
                let image = images.get(kernel).cloned();
                image.ok_or_else(|| CudaError::Artefact(format!("{kernel} was not compiled")))
            }
        }
    }

    /// The driver.
    pub(crate) fn library(&self) -> PathBuf {
        self.folder().join("libcuda.so.1")
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        self.dir.path()
    }
}

/// The folder of the emulator's sources.
fn own() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = ["backends/cuda/tests/emulator", "tests/emulator"].map(|p| folder.join(p));
    own.into_iter().find(|p| p.join("driver.cpp").exists()).expect("the emulator's sources")
}

/// Makes a shared library.
fn compile(dir: &tempfile::TempDir, sources: &[&Path], library: &str) {
    let out = Command::new("g++")
        .args(["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"])
        .arg("-Wl,-Bsymbolic")
        .arg(format!("-Wl,-soname,{library}"))
        .arg("-I")
        .arg(own())
        .arg("-I")
        .arg(dir.path())
        .args(sources)
        .arg("-o")
        .arg(dir.path().join(library))
        .arg("-ldl")
        .output()
        .expect("these tests need a C++ compiler: g++ 12 or later");
    assert!(out.status.success(), "g++: {}", String::from_utf8_lossy(&out.stderr));
}

/// One translation unit of all kernels: types and functions that several of them bring along come once.
fn unit<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> String {
    let mut out = String::from("#include \"device.h\"\n");
    let mut seen = BTreeSet::new();
    let mut table = String::from("static const Kernel KERNELS[] = {\n");
    for kernel in kernels {
        if !seen.insert(kernel.name.clone()) {
            continue;
        }
        let (head, entry) = kernel.text.split_once("extern \"C\"").expect("an entry");
        let mut block = String::new();
        for line in head.lines().filter(|l| !l.starts_with("#include") && !l.starts_with("//")) {
            block.push_str(line);
            block.push('\n');
            if line.starts_with('}') || line.starts_with("typedef") {
                let block = std::mem::take(&mut block);
                if seen.insert(block.clone()) {
                    out.push_str(&block);
                }
            }
        }
        out.push_str("extern \"C\"");
        out.push_str(entry);
        table.push_str(&format!("    KERNEL({}),\n", kernel.name));
    }
    out.push_str(&table);
    out.push_str("};\n");
    out
}
