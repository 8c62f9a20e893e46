//! CUDA C++ text of a kernel, without a device and without a toolkit.
//!
//! cubecl expands a kernel's Rust and prints C++. It asks a driver for the properties of the device; here they are
//! written down for an architecture ([`crate::arch`]). Kernels get pointers only: sizes are constants of the text, and
//! what changes from call to call lies in a small buffer. So a launch needs an address for each argument and nothing
//! else, and a captured graph stays valid.

mod normal;
mod ordering;

use std::sync::{Mutex, PoisonError};

use cubecl::Compiler;
use cubecl::ir::features::Plane;
use cubecl::ir::{
    ContiguousElements, DeviceProperties, HardwareProperties, MatrixLayout, MemoryDeviceProperties, MmaProperties,
    TargetProperties, VectorSize,
};
use cubecl::prelude::*;
use cubecl_cpp::cuda::CudaDialect;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::{CudaWmmaCompiler, contiguous_elements_cuda};
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures, register_mma_features};
use cubecl_cpp::{DialectWmmaCompiler, register_supported_types};

use crate::CudaError;
use crate::arch::Arch;

pub(crate) use ordering::fence;

/// The generator numbers temporaries with a counter of the process that it sets to 0 for each kernel: one at a time.
static GENERATOR: Mutex<()> = Mutex::new(());

type Cpp = CppCompiler<CudaDialect<CudaWmmaCompiler>>;

/// A kernel's text and what its launch needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The entry's name: what the kernel does, and eight digits that stand for its text.
    pub name: String,
    /// CUDA C++: equal for equal input.
    pub text: String,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// Arguments: all are addresses.
    pub args: usize,
}

/// Collects the arguments of a kernel, in order.
pub(crate) struct Args {
    builder: KernelBuilder,
    names: Vec<String>,
}

impl Args {
    /// An array that the kernel only reads, and that nothing else writes meanwhile.
    pub(crate) fn input<C: CubePrimitive>(&mut self, name: &str) -> NativeExpand<Array<C>> {
        self.names.push(name.into());
        let ty = C::as_type(&self.builder.scope);
        self.builder.input_array(ty).into()
    }

    /// An array that the kernel writes, and may read.
    pub(crate) fn output<C: CubePrimitive>(&mut self, name: &str) -> NativeExpand<Array<C>> {
        self.names.push(name.into());
        let ty = C::as_type(&self.builder.scope);
        self.builder.output_array(ty).into()
    }

    /// Where instructions go.
    pub(crate) fn scope(&mut self) -> &mut Scope {
        &mut self.builder.scope
    }
}

/// The text of a kernel with blocks of `threads` threads: `body` declares the arguments in order and expands the code.
///
/// # Errors
/// When the code generator refuses the kernel, or it wants more shared memory than a block can have.
pub(crate) fn emit(arch: &Arch, name: &str, threads: u32, body: impl FnOnce(&mut Args)) -> Result<Source, CudaError> {
    let fail = |why: String| CudaError::Emit { kernel: name.into(), why };
    let settings = KernelSettings::default()
        .cube_dim(CubeDim::new_1d(threads))
        .address_type(AddressType::U32)
        .kernel_name(normal::ENTRY);
    let mut args = Args { builder: KernelBuilder::default(), names: Vec::new() };
    args.builder.runtime_properties(target());
    args.builder.device_properties(&properties(arch));
    settings.address_type.register(&mut args.builder.scope);
    body(&mut args);
    let names = args.names;
    let address = settings.address_type.unsigned_type();
    let definition = args.builder.build(settings);
    let one = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = Cpp::default()
        .compile(definition, &options(), ExecutionMode::Unchecked, address)
        .map_err(|e| fail(e.to_string()))?;
    let raw = kernel.to_string();
    drop(one);
    let normal::Normal { name, text, shared_bytes } = normal::normal(name, &names, &raw).map_err(fail)?;
    if shared_bytes > arch.shared_bytes {
        return Err(fail(format!("{shared_bytes} bytes of shared memory, {} has {}", arch.name(), arch.shared_bytes)));
    }
    Ok(Source { name, text, threads, shared_bytes, args: names.len() })
}

/// What a driver would say of a device of this architecture.
fn properties(arch: &Arch) -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: arch.shared_bytes,
        max_cube_count: (i32::MAX as u32, 65535, 65535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: None,
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        max_vector_size: VectorSize::MAX,
    };
    let memory = MemoryDeviceProperties { max_page_size: 4 << 30, alignment: 512 };
    let timing = cubecl::profile::TimingMethod::System;
    let mut properties = DeviceProperties::new(Default::default(), memory, hardware, timing);
    register_supported_types(&mut properties);
    for plane in [Plane::Ops, Plane::NonUniformControlFlow, Plane::Sync] {
        properties.features.plane.insert(plane);
    }
    properties.features.alignment = true;
    properties.features.memory_reinterpret = true;
    let architecture = CudaArchitecture { version: arch.sm };
    register_mma_features(CudaWmmaCompiler::supported_mma_combinations(&architecture), &mut properties);
    properties
}

fn options() -> CompilationOptions {
    CompilationOptions {
        warp_size: 32,
        supports_features: CppSupportedFeatures {
            grid_constants: true,
            clusters: false,
            elect_sync: false,
            fast_math: false,
            fast_tanh: false,
        },
    }
}

fn target() -> TargetProperties {
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}
