//! The interpreter on burn-cuda. The only module that names `Cuda`: each crate that does pays for compiling burn's
//! kernels.

use std::sync::Arc;

use awqc_ir::op::Sdpa;
use awqc_ir::{FusedDef, Region, TensorSource, ValueId, Verified, WeightId};
use awqc_passes::{Afterwards, ExecError, Executor, InputStats, Tensor};
use burn_backend::tensor::{Device, FloatTensor};
use burn_backend::{DType, Shape, TensorMetadata};
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cuda::Cuda as BurnCuda;
use cubek_matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek_matmul::launch::launch_tiling;
use cubek_matmul::routines::BlueprintStrategy;
use cubek_matmul::routines::simple_unit::SimpleUnitAlgorithm;
use cubek_std::InputBinding;

use super::DeviceSession;
use super::guard::guard;
use super::sums::{DeviceSums, all_finite};
use crate::calibrate::Calibrate;
use crate::control::Control;
use crate::executor::BurnExecutor;
use crate::interp::ExecBackend;
use crate::interp::ops::sdpa::{self, GrowingCache};
use crate::session::{Logits, Session};

/// burn-cuda, without fusion and autotuning.
type Cuda = BurnCuda<f32, i32>;

impl ExecBackend for Cuda {
    type Cache = GrowingCache<Self>;

    /// Burn's own choice for f32 is tensor cores, which round the factors to TF32, 10 bits of mantissa. This is the
    /// kernel that it falls back to where there are none: f32 factors, multiplied and added in registers.
    fn op_matmul(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let out = product_shape(&a.shape().to_vec(), &b.shape().to_vec());
        let out = empty_device_dtype(a.client.clone(), a.device.clone(), Shape::from(out), DType::F32);
        let f32 = DType::F32.into();
        let mut types = MatmulElems::from_globals(&MatmulGlobalElems { lhs: f32, rhs: f32, out: f32 });
        let by = BlueprintStrategy::<(), SimpleUnitAlgorithm>::default();
        let client = out.client.clone();
        let (a, b) = (InputBinding::new(a.binding(), f32), InputBinding::new(b.binding(), f32));
        let done = launch_tiling::launch_ref(&client, a, b, out.clone().binding(), &by, &mut types);
        // Only a panic can say it here, as everywhere in burn; the boundary makes an error of it.
        assert!(done.is_ok(), "a product of {:?} cannot be launched: {done:?}", out.shape());
        out
    }

    fn op_sdpa(
        op: &Sdpa,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cache: Option<&mut Self::Cache>,
    ) -> Result<FloatTensor<Self>, String> {
        sdpa::sdpa::<Self>(op, q, k, v, cache)
    }
}

/// The shape of a product; axes before the last two are those of `a`.
fn product_shape(a: &[usize], b: &[usize]) -> Vec<usize> {
    let mut out = a.to_vec();
    if let (Some(last), Some(columns)) = (out.last_mut(), b.last()) {
        *last = *columns;
    }
    out
}

impl Calibrate for Cuda {
    type Sums = DeviceSums<Self>;

    /// One window after the other: the device works on each with all it has.
    fn each<T: Send, R: Send>(
        windows: Vec<T>,
        run: impl Fn(T) -> Result<R, ExecError> + Send + Sync,
    ) -> Result<Vec<R>, ExecError> {
        windows.into_iter().map(run).collect()
    }

    fn all_finite(tensors: &[&FloatTensor<Self>]) -> Result<bool, ExecError> {
        all_finite::<Self>(tensors)
    }
}

/// See [`super::executor`].
pub(super) fn executor(
    source: Arc<dyn TensorSource>,
    control: Control,
    windows: &[Vec<i32>],
) -> Result<Box<dyn Executor>, ExecError> {
    guard(|| {
        let exec = BurnExecutor::<Cuda>::on(Device::<Cuda>::default(), source).with_control(control);
        let exec = if windows.is_empty() { exec } else { exec.with_calibration(windows)? };
        Ok(Box::new(Guarded(exec)) as Box<dyn Executor>)
    })
}

/// See [`super::session`].
pub(super) fn session(module: Verified<'_>, source: &dyn TensorSource) -> Result<Box<dyn DeviceSession>, ExecError> {
    guard(|| {
        let session = Session::<Cuda>::new(module, source, Device::<Cuda>::default())?;
        Ok(Box::new(Guarded(session)) as Box<dyn DeviceSession>)
    })
}

/// What burn runs, with its panics caught.
struct Guarded<T>(T);

impl Executor for Guarded<BurnExecutor<Cuda>> {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        self.0.realize(region, weight)
    }

    fn profile(
        &mut self,
        region: &Region,
        fused: &[FusedDef],
        taps: &[ValueId],
        afterwards: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        guard(|| self.0.profile(region, fused, taps, afterwards))
    }

    fn evaluate(&self, region: &Region, fused: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        guard(|| self.0.evaluate(region, fused, at))
    }
}

impl DeviceSession for Guarded<Session<Cuda>> {
    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, ExecError> {
        guard(|| self.0.forward(ids, logits))
    }

    fn see(&mut self, pixels: Tensor) -> Result<(), ExecError> {
        guard(|| self.0.see(pixels, &mut |_, _| Ok(())))
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}
