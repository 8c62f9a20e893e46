//! A device through the CUDA driver: memory, modules, launches, captured graphs.
//!
//! Nothing here panics or prints, with or without a driver. All work goes to one stream, in order.

mod api;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;
use std::rc::Rc;

use api::{Api, Handle, NO_DEVICE, OUT_OF_MEMORY, Status};

use crate::CudaError;

/// An address on the device.
pub type Address = u64;

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`, `_MINOR`, `_MULTIPROCESSOR_COUNT`.
const MAJOR: c_int = 75;
const MINOR: c_int = 76;
const MULTIPROCESSORS: c_int = 16;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const SHARED: c_int = 8;
/// Shared memory that a kernel may use without asking.
const SHARED_DEFAULT: usize = 48 << 10;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`.
const THREAD_LOCAL: c_int = 1;

/// A device, ready to work. Copies of it are the same device.
#[derive(Clone)]
pub struct Device {
    inner: Rc<Inner>,
}

struct Inner {
    api: Api,
    device: c_int,
    stream: Handle,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
}

/// Device memory; freed when dropped.
pub struct Buffer {
    inner: Rc<Inner>,
    address: Address,
    bytes: usize,
}

/// A loaded module; unloaded when dropped.
pub struct Code {
    inner: Rc<Inner>,
    handle: Handle,
}

/// A kernel of a [`Code`] that is kept loaded.
#[derive(Clone)]
pub struct Function {
    _code: Rc<Code>,
    handle: Handle,
}

/// One launch.
pub struct Launch<'a> {
    /// The kernel.
    pub function: &'a Function,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// The arguments.
    pub args: &'a [Address],
}

/// Launches that were captured once and are repeated as a whole.
pub struct Graph {
    inner: Rc<Inner>,
    handle: Handle,
}

impl Inner {
    fn check(&self, call: &'static str, status: Status) -> Result<(), CudaError> {
        check(&self.api, call, status)
    }
}

fn check(api: &Api, call: &'static str, status: Status) -> Result<(), CudaError> {
    if status == 0 {
        return Ok(());
    }
    let text = |f: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
        let mut text: *const c_char = ptr::null();
        // SAFETY: the functions write a pointer to a static string, or leave it null.
        unsafe {
            if f(status, &mut text) != 0 || text.is_null() {
                return format!("error {status}");
            }
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    };
    Err(CudaError::Driver { call, name: text(api.error_name), text: text(api.error_string) })
}

impl Device {
    /// The first device of the driver in `library`, or of the system's driver.
    ///
    /// # Errors
    /// When there is no driver, it is too old, or it finds no device.
    pub fn open(library: Option<&Path>) -> Result<Self, CudaError> {
        let api = Api::open(library)?;
        // SAFETY: in this function, every pointer is to a local variable of the documented type.
        unsafe {
            match (api.init)(0) {
                NO_DEVICE => return Err(CudaError::NoDevice),
                status => check(&api, "cuInit", status)?,
            }
            let mut count = 0;
            check(&api, "cuDeviceGetCount", (api.device_count)(&mut count))?;
            if count == 0 {
                return Err(CudaError::NoDevice);
            }
            let mut device = 0;
            check(&api, "cuDeviceGet", (api.device)(&mut device, 0))?;
            let mut name = [0 as c_char; 256];
            check(&api, "cuDeviceGetName", (api.device_name)(name.as_mut_ptr(), 255, device))?;
            let name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
            let attribute = |which| {
                let mut value = 0;
                check(&api, "cuDeviceGetAttribute", (api.device_attribute)(&mut value, which, device))?;
                Ok::<u32, CudaError>(value.max(0) as u32)
            };
            let capability = (attribute(MAJOR)?, attribute(MINOR)?);
            let multiprocessors = attribute(MULTIPROCESSORS)?;
            let mut context = ptr::null_mut();
            check(&api, "cuDevicePrimaryCtxRetain", (api.retain)(&mut context, device))?;
            let mut inner = Inner { api, device, stream: ptr::null_mut(), name, capability, multiprocessors };
            inner.check("cuCtxSetCurrent", (inner.api.set_current)(context))?;
            let mut stream = ptr::null_mut();
            inner.check("cuStreamCreate", (inner.api.stream)(&mut stream, NON_BLOCKING))?;
            inner.stream = stream;
            Ok(Self { inner: Rc::new(inner) })
        }
    }

    /// What the device is called.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors
    }

    /// Bytes of memory that are free.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn free_memory(&self) -> Result<usize, CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers to local variables.
        let status = unsafe { (self.inner.api.memory_info)(&mut free, &mut total) };
        self.inner.check("cuMemGetInfo", status)?;
        Ok(free)
    }

    /// Memory for `what`, not initialised.
    ///
    /// # Errors
    /// When the device has too little.
    pub fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer, CudaError> {
        let mut address = 0;
        // SAFETY: a pointer to a local variable.
        let status = unsafe { (self.inner.api.alloc)(&mut address, bytes.max(1)) };
        if status == OUT_OF_MEMORY {
            let free = self.free_memory().unwrap_or(0);
            return Err(CudaError::Memory { what: what.into(), needed: bytes, free });
        }
        self.inner.check("cuMemAlloc", status)?;
        Ok(Buffer { inner: self.inner.clone(), address, bytes })
    }

    /// Copies to the device: `bytes` may be reused when this returns.
    ///
    /// # Errors
    /// When the driver fails, or `bytes` do not fit behind `offset`.
    pub fn upload(&self, buffer: &Buffer, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        buffer.contains(offset, bytes.len())?;
        let to = buffer.address + offset as u64;
        // SAFETY: the range lies in the buffer; copies from memory that the driver has not pinned are staged before
        // the call returns.
        let status = unsafe { (self.inner.api.upload)(to, bytes.as_ptr().cast(), bytes.len(), self.inner.stream) };
        self.inner.check("cuMemcpyHtoDAsync", status)
    }

    /// Copies from the device, after all work before it.
    ///
    /// # Errors
    /// As [`Device::upload`]; also what went wrong in earlier launches.
    pub fn download(&self, buffer: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        buffer.contains(offset, bytes.len())?;
        let from = buffer.address + offset as u64;
        // SAFETY: the range lies in the buffer, and `bytes` lives until the copy is done.
        let status =
            unsafe { (self.inner.api.download)(bytes.as_mut_ptr().cast(), from, bytes.len(), self.inner.stream) };
        self.inner.check("cuMemcpyDtoHAsync", status)?;
        self.synchronize()
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn copy(&self, from: (&Buffer, usize), to: (&Buffer, usize), bytes: usize) -> Result<(), CudaError> {
        from.0.contains(from.1, bytes)?;
        to.0.contains(to.1, bytes)?;
        let (source, target) = (from.0.address + from.1 as u64, to.0.address + to.1 as u64);
        // SAFETY: both ranges lie in their buffers.
        let status = unsafe { (self.inner.api.copy)(target, source, bytes, self.inner.stream) };
        self.inner.check("cuMemcpyDtoDAsync", status)
    }

    /// Loads a cubin or PTX.
    ///
    /// # Errors
    /// When the driver refuses it: another architecture, a newer PTX than it knows.
    pub fn load(&self, image: &[u8]) -> Result<Rc<Code>, CudaError> {
        // PTX is text and must end in a zero; a cubin does not mind.
        let image: Vec<u8> = image.iter().copied().chain([0]).collect();
        let mut handle = ptr::null_mut();
        // SAFETY: the image is complete and the driver copies it.
        let status = unsafe { (self.inner.api.load)(&mut handle, image.as_ptr().cast::<c_void>()) };
        self.inner.check("cuModuleLoadData", status)?;
        Ok(Rc::new(Code { inner: self.inner.clone(), handle }))
    }

    /// A kernel of loaded code that uses `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// When the code has no such kernel, or the device has too little shared memory.
    pub fn function(&self, code: &Rc<Code>, name: &str, shared_bytes: usize) -> Result<Function, CudaError> {
        let symbol = CString::new(name).map_err(|_| CudaError::Artefact(format!("`{name}` is no kernel's name")))?;
        let mut handle = ptr::null_mut();
        // SAFETY: the module is loaded, the name ends in a zero.
        let status = unsafe { (self.inner.api.function)(&mut handle, code.handle, symbol.as_ptr()) };
        self.inner.check("cuModuleGetFunction", status)?;
        if shared_bytes > SHARED_DEFAULT {
            // SAFETY: the function was just found.
            let status = unsafe { (self.inner.api.function_attribute)(handle, SHARED, shared_bytes as c_int) };
            self.inner.check("cuFuncSetAttribute", status)?;
        }
        Ok(Function { _code: code.clone(), handle })
    }

    /// Launches a kernel: it runs after all work before it.
    ///
    /// # Errors
    /// When the driver refuses the launch. What goes wrong on the device is reported later.
    pub fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut args: Vec<Address> = launch.args.to_vec();
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|a| ptr::from_mut(a).cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the kernel takes as many addresses as its plan says; the driver copies them during the call.
        let status = unsafe {
            (self.inner.api.launch)(
                launch.function.handle,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes as u32,
                self.inner.stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.inner.check("cuLaunchKernel", status)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// What went wrong in it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is this device's.
        let status = unsafe { (self.inner.api.synchronize)(self.inner.stream) };
        self.inner.check("cuStreamSynchronize", status)
    }

    /// Records what `work` launches instead of running it.
    ///
    /// # Errors
    /// Those of `work`, or when the driver cannot capture it.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        let api = &self.inner.api;
        // SAFETY: the stream is this device's; handles are checked before they are used, and destroyed once.
        unsafe {
            self.inner.check("cuStreamBeginCapture", (api.capture_begin)(self.inner.stream, THREAD_LOCAL))?;
            let done = work();
            let mut graph = ptr::null_mut();
            let ended = self.inner.check("cuStreamEndCapture", (api.capture_end)(self.inner.stream, &mut graph));
            done?;
            ended?;
            let mut handle = ptr::null_mut();
            let made = self.inner.check("cuGraphInstantiateWithFlags", (api.graph_instantiate)(&mut handle, graph, 0));
            (api.graph_destroy)(graph);
            made?;
            Ok(Graph { inner: self.inner.clone(), handle })
        }
    }

    /// Runs a captured graph after all work before it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: the graph was instantiated in this context.
        let status = unsafe { (self.inner.api.graph_launch)(graph.handle, self.inner.stream) };
        self.inner.check("cuGraphLaunch", status)
    }

    /// Seconds that `work` takes on the device.
    ///
    /// # Errors
    /// Those of `work`, or of the driver.
    pub fn time(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let api = &self.inner.api;
        let (mut start, mut end, mut milliseconds) = (ptr::null_mut(), ptr::null_mut(), 0f32);
        // SAFETY: events are created before they are used and destroyed once.
        unsafe {
            self.inner.check("cuEventCreate", (api.event)(&mut start, 0))?;
            self.inner.check("cuEventCreate", (api.event)(&mut end, 0))?;
            let measure = || {
                self.inner.check("cuEventRecord", (api.event_record)(start, self.inner.stream))?;
                work()?;
                self.inner.check("cuEventRecord", (api.event_record)(end, self.inner.stream))?;
                self.inner.check("cuEventSynchronize", (api.event_synchronize)(end))?;
                Ok::<(), CudaError>(())
            };
            let done = measure();
            let elapsed = (api.event_elapsed)(&mut milliseconds, start, end);
            (api.event_destroy)(start);
            (api.event_destroy)(end);
            done?;
            self.inner.check("cuEventElapsedTime", elapsed)?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Buffer {
    /// Where it lies.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn contains(&self, offset: usize, bytes: usize) -> Result<(), CudaError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            Some(_) | None => Err(CudaError::Artefact(format!(
                "a copy of {bytes} bytes at {offset} does not fit a buffer of {}",
                self.bytes
            ))),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this driver, freed once; the driver waits for work that uses it.
        unsafe { (self.inner.api.free)(self.address) };
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: loaded by this driver, unloaded once.
        unsafe { (self.inner.api.unload)(self.handle) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by this driver, destroyed once.
        unsafe { (self.inner.api.graph_exec_destroy)(self.handle) };
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the stream is idle when the last user is gone; both were made in `open`.
        unsafe {
            if !self.stream.is_null() {
                (self.api.stream_destroy)(self.stream);
            }
            (self.api.release)(self.device);
        }
    }
}
