//! Products with float matrices as they lie in a file: the output head where it is not quantized, and models that are
//! not quantized at all.

use std::ops::Range;

use awqc_exec::host::math::{dot, simd};
use awqc_exec::host::product_with_transposed;
use awqc_ir::Stored;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::kernels::OutTile;
use crate::program::Dense;

/// Rows of the matrix that are converted and multiplied at a time. Members take whole blocks, so that results do not
/// depend on their number.
pub(crate) const BLOCK_ROWS: usize = 32;
/// Up to this many tokens, dot products.
const FEW: usize = 4;

impl Dense<'_> {
    /// One row as f32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let bytes = &self.bytes[row * self.row_bytes()..(row + 1) * self.row_bytes()];
        match self.stored {
            Stored::F16 => convert(bytes, out, f16::from_le_bytes, |from, to| from.convert_to_f32_slice(to)),
            Stored::Bf16 => convert(bytes, out, bf16::from_le_bytes, |from, to| from.convert_to_f32_slice(to)),
            Stored::F32 | Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => {
                let numbers = bytes.as_chunks::<4>().0;
                out.iter_mut().zip(numbers).for_each(|(o, b)| *o = f32::from_le_bytes(*b));
            }
        }
    }

    fn row_bytes(&self) -> usize {
        self.cols * self.stored.size()
    }

    /// Rows of the matrix as f32, `[rows, cols]`.
    pub(crate) fn rows(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        out.resize(rows.len() * self.cols, 0.0);
        rows.zip(out.chunks_exact_mut(self.cols.max(1))).for_each(|(row, out)| self.row(row, out));
    }

    /// `x Wᵀ` for some rows of the matrix: `x` is `[tokens, cols]`. `scratch` is memory for converted rows and results.
    pub(crate) fn multiply(
        &self,
        rows: Range<usize>,
        x: &[f32],
        tokens: usize,
        scratch: &mut Vec<f32>,
        mut out: OutTile<'_>,
    ) {
        let first = rows.start;
        let mut results = Vec::new();
        for start in rows.clone().step_by(BLOCK_ROWS) {
            let block = start..(start + BLOCK_ROWS).min(rows.end);
            let n = block.len();
            self.rows(block, scratch);
            if tokens <= FEW {
                for (t, x) in x.chunks_exact(self.cols).enumerate() {
                    let line = out.line(t, start - first, n);
                    simd(
                        #[inline(always)]
                        || line.iter_mut().zip(scratch.chunks_exact(self.cols)).for_each(|(y, w)| *y = dot(x, w)),
                    );
                }
            } else {
                results.resize(tokens * n, 0.0);
                product_with_transposed(tokens, n, self.cols, x, scratch, &mut results);
                for (t, line) in results.chunks_exact(n).enumerate() {
                    out.line(t, start - first, n).copy_from_slice(line);
                }
            }
        }
    }
}

/// Two-byte floats to f32, by the machine's own instruction where the bytes are aligned.
fn convert<T: Copy>(bytes: &[u8], out: &mut [f32], one: fn([u8; 2]) -> T, all: impl Fn(&[T], &mut [f32])) {
    let mut part = [one([0; 2]); 256];
    for (bytes, out) in bytes.chunks(512).zip(out.chunks_mut(256)) {
        let numbers = bytes.as_chunks::<2>().0;
        part.iter_mut().zip(numbers).for_each(|(p, b)| *p = one(*b));
        all(&part[..numbers.len()], out);
    }
}
