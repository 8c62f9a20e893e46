//! The activations of a forward pass: one allocation, cut into slots that values share once they are dead.

use std::alloc::{Layout, alloc_zeroed};
use std::cell::UnsafeCell;

use half::f16;

use crate::CpuError;

/// Where a value lives: `width` columns of a slot whose rows have `stride`. A part of a split is such a window, so
/// splitting costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Columns of all slots before this one.
    pub(crate) base: usize,
    /// Columns of the slot.
    pub(crate) stride: usize,
    /// First column in the slot.
    pub(crate) col: usize,
    /// Columns of the value.
    pub(crate) width: usize,
}

/// What an arena may hold: numbers of which zero bytes are one.
pub(crate) trait Number: Copy + Send {}

impl Number for f32 {}
impl Number for f16 {}

/// Slots of `capacity` rows each, one row a token, of numbers `T`.
pub(crate) struct Arena<T = f32> {
    cells: Box<[UnsafeCell<T>]>,
    capacity: usize,
}

// SAFETY: the only access from several threads is through the unsafe functions below, whose callers promise that no
// element is written by one thread while another reads or writes it.
unsafe impl<T: Number> Sync for Arena<T> {}

impl<T: Number> Arena<T> {
    /// Room for `columns` columns of `capacity` rows, for `what`. Rows that are never used take no memory.
    ///
    /// # Errors
    /// When the system has not so much memory.
    pub(crate) fn new(what: &'static str, columns: usize, capacity: usize) -> Result<Self, CpuError> {
        let cells = columns.saturating_mul(capacity);
        let none = || CpuError::Memory { what, bytes: cells.saturating_mul(size_of::<T>()) };
        let layout = Layout::array::<UnsafeCell<T>>(cells).map_err(|_| none())?;
        if layout.size() == 0 {
            return Ok(Self { cells: Box::default(), capacity });
        }
        // SAFETY: the layout has a size. Zero bytes are a number, cells have the layout of what they hold, and the box
        // gives the memory back with the layout that it was taken with.
        let cells = unsafe {
            let start = alloc_zeroed(layout).cast::<UnsafeCell<T>>();
            if start.is_null() {
                return Err(none());
            }
            Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, cells))
        };
        Ok(Self { cells, capacity })
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    fn start(&self, at: Place, row: usize) -> *mut T {
        assert!(row < self.capacity && at.col + at.width <= at.stride);
        let first = at.base * self.capacity + row * at.stride + at.col;
        self.cells[first..first + at.width].as_ptr().cast_mut().cast()
    }

    /// A row of a value.
    ///
    /// # Safety
    /// Nothing may write these elements while the slice lives.
    pub(crate) unsafe fn row(&self, at: Place, row: usize) -> &[T] {
        // SAFETY: `start` checks the bounds; the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.start(at, row), at.width) }
    }

    /// A row of a value, to write.
    ///
    /// # Safety
    /// Nothing else may read or write these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row_mut(&self, at: Place, row: usize) -> &mut [T] {
        // SAFETY: `start` checks the bounds; the caller excludes all others.
        unsafe { std::slice::from_raw_parts_mut(self.start(at, row), at.width) }
    }

    /// Where rows `first..` of a value begin; they are `at.stride` apart.
    ///
    /// # Panics
    /// When the rows are not in the slot.
    pub(crate) fn pointer(&self, at: Place, rows: std::ops::Range<usize>) -> *mut T {
        assert!(rows.end <= self.capacity && rows.start < rows.end);
        self.start(at, rows.end - 1);
        self.start(at, rows.start)
    }

    /// The rows of a value and what lies between them: `(rows − 1) · stride + width` elements.
    ///
    /// # Safety
    /// Nothing may write these elements while the slice lives.
    pub(crate) unsafe fn rows(&self, at: Place, rows: std::ops::Range<usize>) -> &[T] {
        let len = (rows.len() - 1) * at.stride + at.width;
        // SAFETY: `pointer` checks the first and last row; the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.pointer(at, rows), len) }
    }
}
