//! Where packed weights live: in the mapped file, or in huge pages of the process.
//!
//! A product with one token reads every weight once, and with pages of 4 KiB it waits for their addresses to be
//! translated: decoding is about a fifth faster from pages of 2 MiB. The price is a copy when the model is loaded, and
//! memory that other processes do not share.

use std::borrow::Cow;
use std::ops::Range;

use awqc_ir::panels::ALIGN;
use memmap2::MmapMut;

/// Which pages hold the packed weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Huge ones of this process, where the system has them.
    #[default]
    Huge,
    /// Those of the mapped file: nothing is copied, processes share them.
    Map,
}

/// The bytes of a packed weight.
pub(crate) enum Bytes<'a> {
    /// In a mapped file, or in memory of their own.
    There(Cow<'a, [u8]>),
    /// In a piece of [`Memory`].
    Here { piece: usize, at: Range<usize> },
}

/// Zeros in huge pages of this process, or in small ones where the system has no others.
pub struct Room(MmapMut);

impl Room {
    /// Room for so many bytes; `None` if there is no memory for them. What is never touched costs nothing.
    pub fn new(bytes: usize) -> Option<Self> {
        let room = MmapMut::map_anon(bytes.max(1)).ok()?;
        // Small pages hold the same numbers: whether there are huge ones changes the speed only.
        #[cfg(target_os = "linux")]
        let _ = room.advise(memmap2::Advice::HugePage);
        Some(Self(room))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Asks for the cache line at an address, which need not be valid. Where this architecture has no instruction for it,
/// nothing happens.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, which changes nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the instruction changes nothing, whatever the address. The intrinsic for it is not stable.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    let _ = at;
}

/// Memory for packed weights, in pieces of huge pages.
#[derive(Default)]
pub(crate) struct Memory {
    pieces: Vec<Room>,
    /// Bytes of the last piece that are taken.
    taken: usize,
}

/// Bytes of a piece, unless a weight needs more.
const PIECE: usize = 64 << 20;

impl Memory {
    /// Takes weights into huge pages if that is wanted, and leaves them where they are otherwise, also when there is no
    /// memory for them.
    pub(crate) fn take<'a>(&mut self, bytes: Cow<'a, [u8]>, pages: Pages) -> Bytes<'a> {
        if pages == Pages::Map || !self.reserve(bytes.len()) {
            return Bytes::There(bytes);
        }
        let (piece, at) = (self.pieces.len() - 1, self.taken..self.taken + bytes.len());
        self.pieces[piece].bytes_mut()[at.clone()].copy_from_slice(&bytes);
        self.taken = at.end.next_multiple_of(ALIGN);
        Bytes::Here { piece, at }
    }

    /// Makes room for so many bytes in the last piece.
    fn reserve(&mut self, bytes: usize) -> bool {
        if self.pieces.last().is_some_and(|piece| piece.bytes().len().saturating_sub(self.taken) >= bytes) {
            return true;
        }
        let Some(piece) = Room::new(bytes.max(PIECE)) else { return false };
        self.pieces.push(piece);
        self.taken = 0;
        true
    }

    /// The bytes themselves.
    pub(crate) fn get<'b>(&'b self, bytes: &'b Bytes<'_>) -> &'b [u8] {
        match bytes {
            Bytes::There(bytes) => bytes,
            Bytes::Here { piece, at } => &self.pieces[*piece].bytes()[at.clone()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_all_sizes_keep_their_bytes() {
        let mut memory = Memory::default();
        let weight = |i: usize| vec![i as u8; [1, 100, PIECE / 2, PIECE / 2, PIECE + 1, 7][i]];
        let taken: Vec<Bytes<'_>> = (0..6).map(|i| memory.take(Cow::Owned(weight(i)), Pages::Huge)).collect();
        for (i, bytes) in taken.iter().enumerate() {
            assert!(memory.get(bytes) == weight(i), "weight {i}");
        }
        assert!(matches!(memory.take(Cow::Borrowed(&[1]), Pages::Map), Bytes::There(Cow::Borrowed(_))));
    }
}
