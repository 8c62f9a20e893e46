//! Whether there is a CUDA device, asked before burn is: burn panics where something is missing.

use super::DeviceError;

/// Headers that burn's kernels include.
const HEADERS: [&str; 2] = ["cuda_runtime.h", "cuda_fp16.h"];

pub(super) fn probe() -> Result<(), DeviceError> {
    use cudarc::driver::{result, sys};

    // SAFETY: only opens and closes the library; unlike cudarc's other calls it does not panic without one.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    let failed = |e: result::DriverError| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => DeviceError::NoDevice,
        _other => DeviceError::Driver(e.to_string()),
    };
    result::init().map_err(failed)?;
    if result::device::get_count().map_err(failed)? <= 0 {
        return Err(DeviceError::NoDevice);
    }
    // SAFETY: as above.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(DeviceError::NoNvrtc);
    }
    let Some(root) = cubecl_cuda::install::cuda_path() else {
        return Err(DeviceError::NoHeaders("CUDA toolkit where one is usually installed".into()));
    };
    let missing = HEADERS.iter().map(|name| root.join("include").join(name)).find(|path| !path.is_file());
    missing.map_or(Ok(()), |path| Err(DeviceError::NoHeaders(path.display().to_string())))
}
