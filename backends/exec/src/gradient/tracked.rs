//! The host backend with gradients: burn's autodiff around it. Products with a weight, attention and SiLU use the
//! host's own kernels in both directions, everything else burn's primitives.

use awqc_ir::op::Sdpa;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind, binary, unary};
use burn_backend::TensorMetadata;
use burn_backend::tensor::FloatTensor;

use super::attention;
use crate::host::Host;
use crate::host::math::{sigmoid, simd};
use crate::host::matmul::{Into, Mat, product};
use crate::host::{floats, take, tensor};
use crate::interp::ExecBackend;
use crate::interp::ops::{elementwise, sdpa};

/// The host backend, every float tensor of which can be asked for its gradient.
pub(super) type Tracked = Autodiff<Host>;

impl ExecBackend for Tracked {
    type Cache = sdpa::GrowingCache<Self>;

    fn op_linear(x: FloatTensor<Self>, w: &FloatTensor<Self>, b: Option<&FloatTensor<Self>>) -> FloatTensor<Self> {
        let y = linear(x, w);
        match b {
            Some(b) => elementwise::add::<Self>(y, b),
            None => y,
        }
    }

    fn op_sdpa(
        op: &Sdpa,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cache: Option<&mut Self::Cache>,
    ) -> Result<FloatTensor<Self>, String> {
        match cache {
            None if attention::covered(op) => Ok(attention::attend(op, q, k, v)),
            cache => sdpa::sdpa::<Self>(op, q, k, v, cache),
        }
    }

    fn op_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let y = Host::op_silu(x.primitive.clone());
        match Silu.prepare::<NoCheckpointing>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(x.primitive, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// `y = x · sigmoid(x)`; the state is `x`.
#[derive(Debug)]
struct Silu;

impl Backward<Host, 1> for Silu {
    type State = FloatTensor<Host>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let x = ops.state;
        unary::<Host, _>(ops.parents, ops.node, grads, |dy| {
            let shape = x.shape().to_vec();
            let mut out = take(dy);
            simd(
                #[inline(always)]
                || {
                    for (g, x) in out.iter_mut().zip(floats(&x).iter()) {
                        let s = sigmoid(*x);
                        *g *= s * (1.0 + x * (1.0 - s));
                    }
                },
            );
            tensor(out, shape)
        });
    }
}

/// `y = x Wᵀ`: what the way back needs to know of it.
#[derive(Debug)]
struct Linear;

impl Backward<Host, 2> for Linear {
    /// `x` if the gradient of `W` is wanted, `W` if that of `x` is.
    type State = (Option<FloatTensor<Host>>, Option<FloatTensor<Host>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, w) = ops.state;
        binary::<Host, _, _>(
            ops.parents,
            ops.node,
            grads,
            |dy| w.map_or_else(|| dy.clone(), |w| input_gradient(&dy, &w)),
            |dy| x.map_or_else(|| dy.clone(), |x| weight_gradient(&dy, &x)),
        );
    }
}

fn linear(x: FloatTensor<Tracked>, w: &FloatTensor<Tracked>) -> FloatTensor<Tracked> {
    let y = Host::op_linear(x.primitive.clone(), &w.primitive, None);
    match Linear.prepare::<NoCheckpointing>([x.node.clone(), w.node.clone()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (want_x, want_w) = (x.is_tracked(), w.is_tracked());
            prep.finish((want_w.then_some(x.primitive), want_x.then(|| w.primitive.clone())), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

/// `dX = dY W`, for `dY: […,n]` and `W: [n,k]`.
fn input_gradient(dy: &FloatTensor<Host>, w: &FloatTensor<Host>) -> FloatTensor<Host> {
    let (mut shape, sides) = (dy.shape().to_vec(), w.shape().to_vec());
    let (n, k) = (sides[0], sides[1]);
    let (dy, w) = (floats(dy), floats(w));
    let m = dy.len() / n.max(1);
    let mut out = vec![0.0; m * k];
    let (a, b) = (Mat { data: &dy, row: n, col: 1 }, Mat { data: &w, row: k, col: 1 });
    product(m, k, n, &mut out, k, Into::Replace, a, b, 1.0);
    if let Some(last) = shape.last_mut() {
        *last = k;
    }
    tensor(out, shape)
}

/// `dW = dYᵀ X`, for `dY: […,n]` and `X: […,k]`.
fn weight_gradient(dy: &FloatTensor<Host>, x: &FloatTensor<Host>) -> FloatTensor<Host> {
    let last = |t: &FloatTensor<Host>| t.shape().to_vec().last().copied().unwrap_or(1);
    let (n, k) = (last(dy), last(x));
    let (dy, x) = (floats(dy), floats(x));
    let m = dy.len() / n.max(1);
    let mut out = vec![0.0; n * k];
    let (a, b) = (Mat { data: &dy, row: 1, col: n }, Mat { data: &x, row: k, col: 1 });
    product(n, k, m, &mut out, k, Into::Replace, a, b, 1.0);
    tensor(out, vec![n, k])
}
