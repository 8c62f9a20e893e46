//! Kernels on a CPU: their CUDA text, compiled by the system's C++ compiler against a small imitation of what CUDA
//! provides (`device.h`), behind an imitation of the CUDA driver (`driver.cpp`). The crate's own driver code loads it
//! like a real one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use awqc_cuda::emit::Source;

/// A driver that knows some kernels. The folder with it is removed when this is dropped.
pub(crate) struct Emulator {
    dir: tempfile::TempDir,
}

impl Emulator {
    /// Compiles the kernels.
    pub(crate) fn build<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let own = ["backends/cuda/tests/emulator", "tests/emulator"].map(|p| folder.join(p));
        let own = own.iter().find(|p| p.join("driver.cpp").exists()).expect("the emulator's sources");
        std::fs::write(dir.path().join("kernels.cpp"), unit(kernels)).expect("kernels.cpp");
        let out = Command::new("g++")
            .args([
                "-std=c++20",
                "-O1",
                "-ffp-contract=off",
                "-fno-strict-aliasing",
                "-w",
                "-shared",
                "-fPIC",
                "-Wl,-Bsymbolic",
            ])
            .arg("-I")
            .arg(own)
            .arg("-I")
            .arg(dir.path())
            .arg(own.join("driver.cpp"))
            .arg("-o")
            .arg(dir.path().join("libcuda.so.1"))
            .output()
            .expect("these tests need a C++ compiler: g++ 12 or later");
        assert!(out.status.success(), "g++: {}", String::from_utf8_lossy(&out.stderr));
        Self { dir }
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
