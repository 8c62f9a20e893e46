//! Sums over tokens in burn's primitives: the Gram matrix is made where the rows lie, for it costs as much as the
//! products of the model; moments and sampled rows are read back when all is done.

use awqc_passes::{ExecError, InputStats, Tensor};
use burn_backend::tensor::FloatTensor;
use burn_backend::{Backend, Slice, TensorMetadata};

use crate::calibrate::{Rows, Sums};
use crate::gram::{mirror, stride};
use crate::interp::ops::shape::narrow;
use crate::interp::{ExecBackend, Val};

/// Rows whose products are added up before they go to the total: sums of sums lose less in f32 than one long sum.
const ROWS: usize = 512;

/// Statistics of one value under construction, see [`Sums`].
pub struct DeviceSums<B: Backend> {
    channels: usize,
    tokens: u64,
    /// Every `stride`-th row is sampled.
    stride: u64,
    /// `[C,C]`.
    gram: Option<FloatTensor<B>>,
    /// Σ|x| and max|x| of each block, `[1,C]`.
    sum_abs: Vec<FloatTensor<B>>,
    max_abs: Vec<FloatTensor<B>>,
    /// `[rows,C]`.
    sample: Vec<FloatTensor<B>>,
}

impl<B: ExecBackend> DeviceSums<B> {
    /// Adds a block of at most [`ROWS`] rows.
    fn block(&mut self, x: FloatTensor<B>) {
        let rows = x.shape().to_vec().first().copied().unwrap_or(0);
        let gram = B::op_matmul(B::float_transpose(x.clone()), x.clone());
        self.gram = Some(match self.gram.take() {
            Some(sum) => B::float_add(sum, gram),
            None => gram,
        });
        let magnitude = B::float_abs(x.clone());
        self.sum_abs.push(B::float_sum_dim(magnitude.clone(), 0));
        self.max_abs.push(B::float_max_dim(magnitude, 0));
        let first = (self.stride / 2 + self.stride - self.tokens % self.stride) % self.stride;
        if first < rows as u64 {
            let every = Slice::with_step(first as isize, Some(rows as isize), self.stride as isize);
            self.sample.push(B::float_slice(x, &[every, Slice::from(0..self.channels)]));
        }
        self.tokens += rows as u64;
    }
}

/// The rows of all tensors, on the host.
fn rows<B: Backend>(parts: Vec<FloatTensor<B>>) -> Result<Tensor, ExecError> {
    match parts.is_empty() {
        true => Ok(Tensor { shape: vec![0, 0], data: Vec::new() }),
        false => Val::<B>::Float(B::float_cat(parts, 0)).to_tensor(),
    }
}

impl<B: ExecBackend> Sums<B> for DeviceSums<B> {
    fn new(channels: usize, tokens: u64, samples: usize) -> Self {
        let stride = stride(tokens, samples);
        let (sum_abs, max_abs, sample) = (Vec::new(), Vec::new(), Vec::new());
        Self { channels, tokens: 0, stride, gram: None, sum_abs, max_abs, sample }
    }

    fn add(&mut self, blocks: &[Rows<'_, B>]) -> Result<(), ExecError> {
        if self.channels == 0 {
            return Ok(());
        }
        for Rows { of, range } in blocks {
            let all = of.shape().to_vec().iter().product::<usize>() / self.channels;
            let x = B::float_reshape((*of).clone(), [all, self.channels].into());
            for start in range.clone().step_by(ROWS) {
                self.block(narrow::<B>(x.clone(), 0, start, ROWS.min(range.end - start)));
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<InputStats, ExecError> {
        let c = self.channels;
        let gram = self.gram.map(|g| Val::<B>::Float(g).to_tensor()).transpose()?;
        let mut gram = gram.map_or_else(|| vec![0.0; c * c], |g| g.data);
        mirror(&mut gram, c);
        let (mut sums, mut maxima) = (vec![0.0f64; c], vec![0.0f32; c]);
        for row in rows::<B>(self.sum_abs)?.data.chunks_exact(c.max(1)) {
            sums.iter_mut().zip(row).for_each(|(a, b)| *a += f64::from(*b));
        }
        for row in rows::<B>(self.max_abs)?.data.chunks_exact(c.max(1)) {
            maxima.iter_mut().zip(row).for_each(|(a, b)| *a = a.max(*b));
        }
        let n = (self.tokens as f64).max(1.0);
        Ok(InputStats {
            tokens: self.tokens,
            mean_abs: sums.iter().map(|s| (s / n) as f32).collect(),
            max_abs: maxima,
            gram,
            sample: rows::<B>(self.sample)?.data,
        })
    }
}

/// Whether all numbers are finite, for tensors of which one number is read: `x − x` is 0 for a finite `x` alone.
///
/// # Errors
/// When the device cannot be read.
pub(crate) fn all_finite<B: Backend>(tensors: &[&FloatTensor<B>]) -> Result<bool, ExecError> {
    let some = tensors.iter().filter(|t| t.shape().to_vec().iter().all(|n| *n > 0));
    let zeros = some.map(|t| B::float_sum(B::float_sub((*t).clone(), (*t).clone()))).collect();
    Ok(rows::<B>(zeros)?.data.iter().all(|v| *v == 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gram::Accumulator;
    use crate::host::Host;
    use crate::interp::upload;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 250.0).collect()
    }

    #[test]
    fn sums_in_primitives_are_those_of_the_host() {
        let (c, blocks) = (37, [700usize, 1, 33]);
        let x = numbers(blocks.iter().sum::<usize>() * c);
        let total = (x.len() / c) as u64;
        let (mut device, mut host) = (DeviceSums::<Host>::new(c, total, 50), Accumulator::new(c, total, 50));
        let mut start = 0;
        for n in blocks {
            let part = &x[start * c..(start + n) * c];
            host.add(&[part]);
            // As one window of a batch, all but its last row, and then that.
            let of = upload::<Host>(Tensor { shape: vec![1, n, c], data: part.to_vec() }, &Default::default());
            device.add(&[Rows { of: &of, range: 0..n - 1 }, Rows { of: &of, range: n - 1..n }]).expect("sums");
            start += n;
        }
        let (got, want) = (device.finish().expect("statistics"), host.finish());
        assert_eq!((got.tokens, &got.sample, &got.max_abs), (want.tokens, &want.sample, &want.max_abs));
        for (got, want) in got.mean_abs.iter().zip(&want.mean_abs).chain(got.gram.iter().zip(&want.gram)) {
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1e3), "{got} is not {want}");
        }
    }

    #[test]
    fn what_is_not_finite_is_found() {
        let tensor = |data: Vec<f32>| upload::<Host>(Tensor { shape: vec![1, data.len()], data }, &Default::default());
        let (good, empty) = (tensor(vec![1e38, -1e38, 0.0]), tensor(Vec::new()));
        assert!(all_finite::<Host>(&[&good, &empty, &good]).expect("read"));
        assert!(all_finite::<Host>(&[]).expect("read"));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!all_finite::<Host>(&[&good, &tensor(vec![0.0, bad])]).expect("read"), "{bad}");
        }
    }
}
