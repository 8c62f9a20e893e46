//! Activations as the kernels read them: in the blocks of a weight's columns, padded as the weight is.
//!
//! Tokens are cut into tiles of [`TILE`]. A tile holds, block after block, its tokens' 32 numbers, so that a kernel
//! that has unpacked a block of weights reads the block of every token in one run. A tile is also what a kernel
//! multiplies with one panel before it goes to the next: its activations stay in the cache.

use crate::kernels::isa::Isa;
use awqc_exec::host::math::simd;
use awqc_ir::panels::{BLOCK, Panels};
use half::bf16;

/// Tokens of a tile; the last one may have fewer.
pub const TILE: usize = 64;

/// Activations rounded to eight bits: per token and block of 32 columns symmetric integers and one scale.
///
/// `scale = amax / 127`, integers are rounded to nearest, halves to even. A block with a NaN or an infinity has the
/// scale NaN: every product with it is NaN. A block whose scale would be subnormal (`amax` below 1.5e-36) counts as 0.
#[derive(Clone, Debug, Default)]
pub struct Acts {
    tokens: usize,
    columns: Option<Panels>,
    /// Tiles of `[blocks, tokens, 32]`.
    codes: Vec<i8>,
    /// Tiles of `[blocks, tokens]`.
    scales: Vec<f32>,
    /// Tiles of `[groups, tokens]`: the sums of the rounded activations, through which the zero point goes.
    sums: Vec<f32>,
}

/// The rounded activations of one tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a> {
    pub(crate) tokens: usize,
    pub(crate) codes: &'a [i8],
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [f32],
}

/// One tile of [`Acts`] to be filled; tiles can be filled by several threads.
#[derive(Debug)]
pub struct TileMut<'a> {
    first: usize,
    tokens: usize,
    columns: Panels,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Acts {
    /// Makes room for `tokens` rows of activations for weights with the columns and groups of `shape`. Memory is
    /// reused. The contents are unspecified until every tile of [`tiles_mut`](Self::tiles_mut) is filled.
    ///
    /// # Panics
    /// When so many numbers cannot be addressed.
    pub fn resize(&mut self, shape: &Panels, tokens: usize) {
        let codes = tokens.checked_mul(shape.padded_cols()).filter(|n| *n <= isize::MAX as usize);
        self.codes.resize(codes.expect("activations fit the address space"), 0);
        self.scales.resize(tokens * shape.blocks(), 0.0);
        self.sums.resize(tokens * shape.groups(), 0.0);
        self.tokens = tokens;
        self.columns = Some(*shape);
    }

    /// Rounds `x`, `[tokens, cols]`, for weights with the columns and groups of `shape`.
    ///
    /// # Panics
    /// When `x` is not that long, or the machine lacks `isa`.
    pub fn quantize(&mut self, isa: Isa, shape: &Panels, tokens: usize, x: &[f32]) {
        assert_eq!(x.len(), tokens.saturating_mul(shape.cols()), "activations of {tokens} tokens");
        self.resize(shape, tokens);
        self.tiles_mut().for_each(|mut tile| tile.quantize(isa, x));
    }

    /// The tiles, in the order of their tokens.
    pub fn tiles_mut(&mut self) -> impl Iterator<Item = TileMut<'_>> {
        let (tokens, mut first) = (self.tokens, 0);
        let (mut codes, mut scales, mut sums) = (&mut self.codes[..], &mut self.scales[..], &mut self.sums[..]);
        let columns = self.columns;
        std::iter::from_fn(move || {
            let columns = columns.filter(|_| first < tokens)?;
            let n = TILE.min(tokens - first);
            let tile = TileMut {
                first,
                tokens: n,
                columns,
                codes: codes.split_off_mut(..n * columns.padded_cols())?,
                scales: scales.split_off_mut(..n * columns.blocks())?,
                sums: sums.split_off_mut(..n * columns.groups())?,
            };
            first += n;
            Some(tile)
        })
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether they are laid out for weights with the columns and groups of `shape`.
    pub fn serves(&self, shape: &Panels) -> bool {
        self.columns.is_some_and(|c| c.same_columns(shape))
    }

    /// The tiles, each with the number of its first token.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, Tile<'_>)> {
        let (blocks, groups) = self.columns.map_or((0, 0), |c| (c.blocks(), c.groups()));
        (0..self.tokens).step_by(TILE).map(move |first| {
            let (n, end) = (TILE.min(self.tokens - first), (first + TILE).min(self.tokens));
            let codes = &self.codes[first * blocks * BLOCK..end * blocks * BLOCK];
            let (scales, sums) = (&self.scales[first * blocks..end * blocks], &self.sums[first * groups..end * groups]);
            (first, Tile { tokens: n, codes, scales, sums })
        })
    }
}

impl TileMut<'_> {
    /// Rounds this tile's tokens of `x`, `[tokens, cols]`: all tokens, not only the tile's.
    ///
    /// # Panics
    /// When `x` has fewer tokens than the tile wants, or the machine lacks `isa`.
    pub fn quantize(&mut self, isa: Isa, x: &[f32]) {
        isa.expect_available();
        let cols = self.columns.cols();
        let x = &x[self.first * cols..(self.first + self.tokens) * cols];
        match isa {
            // SAFETY: `expect_available` found every feature of the instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { crate::kernels::x86::quantize_avx2(self, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => unsafe { crate::kernels::x86::quantize_avx512(self, x) },
            _ => self.fill(x),
        }
    }

    /// [`quantize`](Self::quantize), compiled for the caller's instruction set. The operations are the same in all of
    /// them: no sum depends on an order, and nothing is fused.
    #[inline(always)]
    pub(crate) fn fill(&mut self, x: &[f32]) {
        let n = self.tokens;
        for (t, x) in x.chunks_exact(self.columns.cols().max(1)).enumerate() {
            for g in 0..self.columns.groups() {
                let (columns, blocks) = (self.columns.group_columns(g), self.columns.group_blocks(g));
                let mut group_sum = 0.0;
                for (b, x) in blocks.zip(x[columns].chunks(BLOCK)) {
                    let at = b * n + t;
                    let out = &mut self.codes[at * BLOCK..(at + 1) * BLOCK];
                    let (scale, sum) = match x.as_array::<BLOCK>() {
                        Some(x) => round_block(x, out),
                        None => {
                            let mut padded = [0.0; BLOCK];
                            padded[..x.len()].copy_from_slice(x);
                            round_block(&padded, out)
                        }
                    };
                    self.scales[at] = scale;
                    group_sum += scale * sum as f32;
                }
                self.sums[g * n + t] = group_sum;
            }
        }
    }
}

/// Rounds one block; its scale and the sum of its integers.
#[inline(always)]
fn round_block(x: &[f32; BLOCK], out: &mut [i8]) -> (f32, i32) {
    // Adding 1.5 · 2²³ leaves the nearest integer (halves to even) in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    const INFINITY: u32 = f32::INFINITY.to_bits();
    // As integers, magnitudes are ordered as the numbers are, with infinity and then NaN on top.
    let top = x.iter().fold(0, |top: u32, v| top.max(v.to_bits() & !(1 << 31)));
    let scale = f32::from_bits(top) / 127.0;
    if top >= INFINITY || scale < f32::MIN_POSITIVE {
        out.fill(0);
        return (if top >= INFINITY { f32::NAN } else { 0.0 }, 0);
    }
    let inverse = 127.0 / f32::from_bits(top);
    let mut sum = 0;
    for (o, v) in out.iter_mut().zip(x) {
        let q = (v * inverse + MAGIC).to_bits() as i8;
        *o = q;
        sum += i32::from(q);
    }
    (scale, sum)
}

/// Activations in f32, for the exact mode.
#[derive(Clone, Debug, Default)]
pub struct FloatActs {
    tokens: usize,
    columns: Option<Panels>,
    /// Tiles of `[blocks, tokens, 32]`; 0 in the padding.
    values: Vec<f32>,
}

impl FloatActs {
    /// Copies `x`, `[tokens, cols]`, for weights with the columns and groups of `shape`. Memory is reused.
    ///
    /// # Panics
    /// When `x` is not that long, or so many numbers cannot be addressed.
    pub fn copy(&mut self, shape: &Panels, tokens: usize, x: &[f32]) {
        let bytes = tokens.checked_mul(shape.padded_cols()).and_then(|n| n.checked_mul(size_of::<f32>()));
        assert!(bytes.is_some_and(|n| n <= isize::MAX as usize), "activations do not fit the address space");
        assert_eq!(x.len(), tokens * shape.cols(), "activations of {tokens} tokens");
        self.values.resize(tokens * shape.padded_cols(), 0.0);
        self.tokens = tokens;
        self.columns = Some(*shape);
        let tiles = self.values.chunks_mut((TILE * shape.padded_cols()).max(1));
        for (tile, x) in tiles.zip(x.chunks((TILE * shape.cols()).max(1))) {
            let n = tile.len() / shape.padded_cols();
            for (t, x) in x.chunks_exact(shape.cols()).enumerate() {
                for g in 0..shape.groups() {
                    for (b, x) in shape.group_blocks(g).zip(x[shape.group_columns(g)].chunks(BLOCK)) {
                        let at = (b * n + t) * BLOCK;
                        let (copied, padding) = tile[at..at + BLOCK].split_at_mut(x.len());
                        copied.copy_from_slice(x);
                        padding.fill(0.0);
                    }
                }
            }
        }
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether they are laid out for weights with the columns and groups of `shape`.
    pub fn serves(&self, shape: &Panels) -> bool {
        self.columns.is_some_and(|c| c.same_columns(shape))
    }

    /// The tiles, `[blocks, tokens, 32]`, each with the number of its first token and of its tokens.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let padded = self.columns.map_or(0, |c| c.padded_cols());
        (0..self.tokens).step_by(TILE).map(move |first| {
            let end = (first + TILE).min(self.tokens);
            (first, end - first, &self.values[first * padded..end * padded])
        })
    }
}

/// Activations rounded to bf16, for products of many tokens.
#[derive(Clone, Debug, Default)]
pub struct Bf16Acts {
    tokens: usize,
    columns: Option<Panels>,
    /// `[blocks, lines]`; 0 in the padding of blocks and in lines without a token.
    values: Vec<Line>,
}

/// A block of bf16 numbers, in a cache line of its own.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
pub struct Line(pub(crate) [u16; BLOCK]);

impl Bf16Acts {
    /// Lines are a multiple of this.
    pub(crate) const LINES: usize = 16;

    /// Rounds `x`, `[tokens, cols]`, to nearest, halves to even, for weights with the columns and groups of `shape`.
    /// Memory is reused. NaN stays NaN, and an infinity one.
    ///
    /// # Panics
    /// When `x` is not that long, or so many numbers cannot be addressed.
    pub fn round(&mut self, shape: &Panels, tokens: usize, x: &[f32]) {
        assert_eq!(Some(x.len()), tokens.checked_mul(shape.cols()), "activations of {tokens} tokens");
        self.tokens = tokens;
        self.columns = Some(*shape);
        let lines = self.lines();
        let all = lines.checked_mul(shape.blocks()).filter(|n| *n <= isize::MAX as usize / size_of::<Line>());
        self.values.clear();
        self.values.resize(all.expect("activations fit the address space"), Line::default());
        simd(
            #[inline(always)]
            || self.fill(shape, lines, x),
        );
    }

    #[inline(always)]
    fn fill(&mut self, shape: &Panels, lines: usize, x: &[f32]) {
        for (t, x) in x.chunks_exact(shape.cols().max(1)).enumerate() {
            for g in 0..shape.groups() {
                for (b, x) in shape.group_blocks(g).zip(x[shape.group_columns(g)].chunks(BLOCK)) {
                    let to = &mut self.values[b * lines + t].0;
                    to.iter_mut().zip(x).for_each(|(to, v)| *to = bf16::from_f32(*v).to_bits());
                }
            }
        }
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Lines of a block: the tokens, padded.
    pub(crate) fn lines(&self) -> usize {
        self.tokens.next_multiple_of(Self::LINES)
    }

    /// The numbers, `[blocks, lines]`.
    pub fn values(&self) -> &[Line] {
        &self.values
    }

    /// Whether they are laid out for weights with the columns and groups of `shape`.
    pub fn serves(&self, shape: &Panels) -> bool {
        self.columns.is_some_and(|c| c.same_columns(shape))
    }
}
