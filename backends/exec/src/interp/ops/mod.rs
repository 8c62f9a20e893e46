//! The ops in burn's rank-less primitives: what every backend can run.

pub mod elementwise;
pub mod embedding;
pub mod image;
pub mod linear;
pub mod memory;
pub mod norm;
pub mod rope;
pub mod routing;
pub mod rows;
pub mod sdpa;
pub mod shape;

use burn_backend::Backend;
use burn_backend::tensor::FloatTensor;
use burn_backend::{Shape, TensorMetadata};

/// The last axis of a shape, 1 for a scalar.
fn last(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1)
}

fn dims<B: Backend>(x: &FloatTensor<B>) -> Vec<usize> {
    x.shape().to_vec()
}

fn reshape<B: Backend>(x: FloatTensor<B>, shape: &[usize]) -> FloatTensor<B> {
    B::float_reshape(x, Shape::from(shape.to_vec()))
}

/// `x` with leading axes of length 1 up to `rank`, so that burn broadcasts it.
fn lift<B: Backend>(x: FloatTensor<B>, rank: usize) -> FloatTensor<B> {
    let shape = dims::<B>(&x);
    let lifted: Vec<usize> = std::iter::repeat_n(1, rank.saturating_sub(shape.len())).chain(shape).collect();
    reshape::<B>(x, &lifted)
}

fn softmax_last<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let axis = dims::<B>(&x).len().saturating_sub(1);
    B::softmax(x, axis)
}
