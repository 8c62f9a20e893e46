//! Keys and values of earlier positions, as the products of attention take them.
//!
//! A head of keys is made of panels of 16 positions: the first channel of all of them, then the second, and so on. So a
//! query meets 16 keys at once, and nothing is summed across lanes. A head of values has one position after the other,
//! padded to a multiple of 16 channels.

use std::ops::Range;

use awqc_ir::panels::PANEL_ROWS;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::CpuError;
use crate::arena::{Arena, Number, Place};
use crate::kernels::{Numbers, Stacked};

/// What keys and values of earlier positions are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheNumbers {
    /// Rounded to f16: half of the memory, and of what attention reads.
    #[default]
    F16,
    /// As they are.
    F32,
}

impl CacheNumbers {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F16, Self::F32];

    /// What the command line calls them.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// Rows of numbers in one of the two forms.
enum Store {
    F16(Arena<f16>),
    F32(Arena),
}

impl Store {
    fn new(of: CacheNumbers, what: &'static str, columns: usize, rows: usize) -> Result<Self, CpuError> {
        Ok(match of {
            CacheNumbers::F16 => Self::F16(Arena::new(what, columns, rows)?),
            CacheNumbers::F32 => Self::F32(Arena::new(what, columns, rows)?),
        })
    }

    /// Writes `x` from the first of some rows of a place on, `step` numbers apart: 1 within a row, the place's stride
    /// from row to row.
    ///
    /// # Safety
    /// Nothing else may read or write these rows, and what is written lies within them.
    unsafe fn put(&self, at: Place, rows: Range<usize>, step: usize, x: &[f32]) {
        match self {
            Self::F16(arena) => {
                let to = arena.pointer(at, rows);
                for (i, x) in x.chunks(ROUNDED).enumerate() {
                    let mut limited = [0.0; ROUNDED];
                    limited.iter_mut().zip(x).for_each(|(to, x)| *to = x.clamp(-LARGEST, LARGEST));
                    let mut rounded = [f16::ZERO; ROUNDED];
                    rounded.convert_from_f32_slice(&limited);
                    // SAFETY: the caller's promise.
                    unsafe { write(to.add(i * ROUNDED * step), step, &rounded[..x.len()]) }
                }
            }
            // SAFETY: the caller's promise.
            Self::F32(arena) => unsafe { write(arena.pointer(at, rows), step, x) },
        }
    }

    /// # Safety
    /// As [`Arena::rows`].
    unsafe fn rows(&self, at: Place, rows: Range<usize>) -> Numbers<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(arena) => Numbers::F16(arena.rows(at, rows)),
                Self::F32(arena) => Numbers::F32(arena.rows(at, rows)),
            }
        }
    }
}

/// Numbers that are rounded together.
const ROUNDED: usize = 64;
/// What f16 cannot hold would be infinite, and infinity times a weight of 0 is no number.
const LARGEST: f32 = 65504.0;

/// Writes `x`, `step` numbers apart.
///
/// # Safety
/// There is memory for them at `to` that nothing else uses.
unsafe fn write<T: Number>(to: *mut T, step: usize, x: &[T]) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(i * step).write(*x) }
    }
}

/// What a cache is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheShape {
    /// Heads of keys and of values.
    pub(crate) heads: usize,
    /// Channels of all keys of a position.
    pub(crate) keys: usize,
    /// Channels of all values of a position.
    pub(crate) values: usize,
}

impl CacheShape {
    /// Channels of a head of keys.
    fn width(&self) -> usize {
        self.keys / self.heads.max(1)
    }

    /// Channels of a head of values.
    fn out(&self) -> usize {
        self.values / self.heads.max(1)
    }

    /// The same with padding.
    pub(crate) fn padded(&self) -> usize {
        self.out().next_multiple_of(PANEL_ROWS)
    }
}

/// The keys and values of one attention.
pub(crate) struct Cache {
    shape: CacheShape,
    /// `[heads, panels, channels of a head]` rows of 16 positions.
    keys: Store,
    /// `[heads, positions]` rows of the channels of a head, and padding.
    values: Store,
    /// Panels of a head.
    panels: usize,
}

impl Cache {
    /// Room for so many positions.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub(crate) fn new(shape: CacheShape, of: CacheNumbers, positions: usize) -> Result<Self, CpuError> {
        let panels = positions.div_ceil(PANEL_ROWS);
        let keys = Store::new(of, "the keys of all positions", PANEL_ROWS, shape.keys.saturating_mul(panels))?;
        let rows = shape.heads.saturating_mul(panels.saturating_mul(PANEL_ROWS));
        let values = Store::new(of, "the values of all positions", shape.padded(), rows)?;
        Ok(Self { shape, keys, values, panels })
    }

    /// What it is for.
    pub(crate) fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Takes the key and the value of a position.
    ///
    /// # Safety
    /// Nothing else may read or write those of this position meanwhile.
    pub(crate) unsafe fn remember(&self, position: usize, k: &[f32], v: &[f32]) {
        let (panel, lane) = (position / PANEL_ROWS, position % PANEL_ROWS);
        let at = Place { base: 0, stride: PANEL_ROWS, col: lane, width: 1 };
        for (h, k) in k.chunks_exact(self.shape.width()).enumerate() {
            let first = (h * self.panels + panel) * k.len();
            // SAFETY: the caller's promise; a row holds one channel of this position.
            unsafe { self.keys.put(at, first..first + k.len(), at.stride, k) }
        }
        for (h, v) in v.chunks_exact(self.shape.out()).enumerate() {
            let (at, row) = (Place { width: v.len(), ..self.value() }, h * self.panels * PANEL_ROWS + position);
            // SAFETY: the caller's promise; a row holds all channels.
            unsafe { self.values.put(at, row..row + 1, 1, v) }
        }
    }

    /// A head's values of one position, and padding.
    fn value(&self) -> Place {
        Place { base: 0, stride: self.shape.padded(), col: 0, width: self.shape.padded() }
    }

    /// The keys of a head in some panels.
    ///
    /// # Safety
    /// Nothing may write them while they are read.
    pub(crate) unsafe fn keys(&self, head: usize, panels: Range<usize>) -> Stacked<'_> {
        let (width, first) = (self.shape.width(), head * self.panels);
        let at = Place { base: 0, stride: PANEL_ROWS, col: 0, width: PANEL_ROWS };
        // SAFETY: the caller's promise.
        let data = unsafe { self.keys.rows(at, (first + panels.start) * width..(first + panels.end) * width) };
        Stacked { data, panels: panels.len(), depth: width, panel_step: width * PANEL_ROWS, step: PANEL_ROWS }
    }

    /// The values of a head at some positions, channels in panels.
    ///
    /// # Safety
    /// As [`Cache::keys`].
    pub(crate) unsafe fn values(&self, head: usize, positions: Range<usize>) -> Stacked<'_> {
        let (at, first, depth) = (self.value(), head * self.panels * PANEL_ROWS, positions.len());
        // SAFETY: the caller's promise.
        let data = unsafe { self.values.rows(at, first + positions.start..first + positions.end) };
        Stacked { data, panels: at.width / PANEL_ROWS, depth, panel_step: PANEL_ROWS, step: at.width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_positions_are_refused() {
        let shape = CacheShape { heads: 1, keys: 64, values: 64 };
        let refused = Cache::new(shape, CacheNumbers::F16, usize::MAX / 2)
            .map(|_| ())
            .expect_err("no machine has so much")
            .to_string();
        assert!(refused.contains("no memory for the keys"), "{refused}");
    }

    #[test]
    fn what_f16_cannot_hold_stays_finite() {
        let shape = CacheShape { heads: 1, keys: 2, values: 2 };
        for (of, largest) in [(CacheNumbers::F16, LARGEST), (CacheNumbers::F32, 1e6)] {
            let cache = Cache::new(shape, of, 1).expect("memory");
            // SAFETY: there is one thread.
            let (keys, values) = unsafe {
                cache.remember(0, &[1e6, -1e6], &[f32::NAN, 1e6]);
                (cache.keys(0, 0..1), cache.values(0, 0..1))
            };
            assert_eq!((keys.data.get(0), keys.data.get(keys.step)), (largest, -largest));
            assert!(values.data.get(0).is_nan() && values.data.get(1) == largest);
        }
    }

    #[test]
    fn what_is_remembered_is_where_products_look() {
        CacheNumbers::ALL.into_iter().for_each(what_is_remembered);
    }

    fn what_is_remembered(of: CacheNumbers) {
        let (heads, width, out) = (2, 3, 5);
        let shape = CacheShape { heads, keys: heads * width, values: heads * out };
        let cache = Cache::new(shape, of, 40).expect("memory");
        let key = |position: usize, channel: usize| (32 * position + channel) as f32;
        for position in (0..37).rev() {
            let k: Vec<f32> = (0..heads * width).map(|c| key(position, c)).collect();
            let v: Vec<f32> = (0..heads * out).map(|c| -key(position, c)).collect();
            // SAFETY: there is one thread.
            unsafe { cache.remember(position, &k, &v) };
        }
        for h in 0..heads {
            // SAFETY: as above.
            let (keys, values) = unsafe { (cache.keys(h, 1..3), cache.values(h, 16..37)) };
            assert_eq!((keys.panels, keys.depth, values.panels, values.depth), (2, width, 1, 21));
            for position in 16..37 {
                let at = (position / 16 - 1) * keys.panel_step + position % 16;
                for d in 0..width {
                    assert_eq!(keys.data.get(at + d * keys.step), key(position, h * width + d));
                }
                for c in 0..out {
                    assert_eq!(values.data.get((position - 16) * values.step + c), -key(position, h * out + c));
                }
            }
        }
    }
}
