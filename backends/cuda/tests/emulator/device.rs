//! The machine's own device in the emulator's place.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use awqc_cuda::Nvrtc;
use awqc_cuda::arch::Arch;
use awqc_cuda::driver::Device;
use awqc_cuda::emit::Source;

/// Whether tests are to run on the machine's device. A test that cannot have it fails.
pub(crate) fn on_device() -> bool {
    std::env::var_os("AWQC_GPU").is_some_and(|v| v != "0" && !v.is_empty())
}

/// The architecture that kernels are written for: the device's, or one for the emulator.
pub(crate) fn arch() -> &'static Arch {
    let sm = if on_device() {
        let (major, minor) = Device::open(None).expect("AWQC_GPU is set, so a device is needed").capability();
        10 * major + minor
    } else {
        89
    };
    Arch::find(sm).expect("an architecture")
}

/// Machine code of each kernel for the device.
pub(super) fn compile<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> BTreeMap<String, Vec<u8>> {
    let folders: Vec<PathBuf> =
        std::env::var_os("AWQC_NVRTC").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    let nvrtc = Nvrtc::open(&folders).expect("NVRTC: AWQC_NVRTC names its folder");
    let arch = arch();
    let kernels: BTreeMap<&str, &Source> = kernels.into_iter().map(|k| (k.name.as_str(), k)).collect();
    let list: Vec<&Source> = kernels.into_values().collect();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(kernel) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let code = nvrtc.compile_text(&kernel.name, &kernel.text, arch).expect("a kernel compiles");
                    done.lock().expect("no thread failed").insert(kernel.name.clone(), code);
                }
            });
        }
    });
    done.into_inner().expect("no thread failed")
}
