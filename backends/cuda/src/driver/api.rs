//! The functions of the CUDA driver that this crate calls, found at run time: the program links to no part of CUDA.
//!
//! Signatures are those of the CUDA Driver API. A driver that lacks one of them is older than CUDA 11.4.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;

use libloading::Library;

use crate::CudaError;
use crate::library::functions;

/// `CUresult`: 0 is success.
pub(crate) type Status = c_int;
/// `CUdeviceptr`.
pub(crate) type Pointer = u64;
/// `CUcontext`, `CUmodule`, `CUfunction`, `CUstream`, `CUgraph`, `CUgraphExec`, `CUevent`.
pub(crate) type Handle = *mut c_void;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(crate) const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NO_DEVICE`.
pub(crate) const NO_DEVICE: Status = 100;

functions! {
    Api, |symbol| CudaError::OldDriver(format!("it lacks {symbol}"));
    init = "cuInit": fn(c_uint);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, c_int);
    release = "cuDevicePrimaryCtxRelease_v2": fn(c_int);
    set_current = "cuCtxSetCurrent": fn(Handle);
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    alloc = "cuMemAlloc_v2": fn(*mut Pointer, usize);
    free = "cuMemFree_v2": fn(Pointer);
    upload = "cuMemcpyHtoDAsync_v2": fn(Pointer, *const c_void, usize, Handle);
    download = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, Pointer, usize, Handle);
    copy = "cuMemcpyDtoDAsync_v2": fn(Pointer, Pointer, usize, Handle);
    load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    unload = "cuModuleUnload": fn(Handle);
    function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute": fn(Handle, c_int, c_int);
    launch = "cuLaunchKernel": fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    stream = "cuStreamCreate": fn(*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(Handle);
    synchronize = "cuStreamSynchronize": fn(Handle);
    capture_begin = "cuStreamBeginCapture_v2": fn(Handle, c_int);
    capture_end = "cuStreamEndCapture": fn(Handle, *mut Handle);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Handle, Handle, u64);
    graph_launch = "cuGraphLaunch": fn(Handle, Handle);
    graph_destroy = "cuGraphDestroy": fn(Handle);
    graph_exec_destroy = "cuGraphExecDestroy": fn(Handle);
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char);
    error_string = "cuGetErrorString": fn(Status, *mut *const c_char);
    event = "cuEventCreate": fn(*mut Handle, c_uint);
    event_record = "cuEventRecord": fn(Handle, Handle);
    event_synchronize = "cuEventSynchronize": fn(Handle);
    event_elapsed = "cuEventElapsedTime": fn(*mut f32, Handle, Handle);
    event_destroy = "cuEventDestroy_v2": fn(Handle);
}

impl Api {
    /// The driver in `library`, or where the system keeps it.
    pub(crate) fn open(library: Option<&Path>) -> Result<Self, CudaError> {
        let names: Vec<&Path> = match library {
            Some(path) => vec![path],
            None => ["libcuda.so.1", "libcuda.so", "nvcuda.dll"].map(Path::new).to_vec(),
        };
        let mut why = String::new();
        for name in names {
            // SAFETY: a CUDA driver's initialisers have no preconditions.
            match unsafe { Library::new(name) } {
                Ok(library) => return Self::find(library),
                Err(error) if why.is_empty() => why = error.to_string(),
                Err(_) => {}
            }
        }
        Err(CudaError::NoDriver(why))
    }
}
