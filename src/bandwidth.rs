//! How fast this machine reads memory: what decoding is measured against.

use std::hint::black_box;
use std::time::Instant;

use awqc_cpu::{Pool, Room, prefetch};
use awqc_exec::host::math::simd;

/// Bytes that are read: more than caches hold.
const BYTES: usize = 512 << 20;
const ROUNDS: usize = 4;
/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Lines that are asked for ahead of their use, as the kernels do.
const AHEAD: usize = 64;

/// Gigabytes a second that `threads` threads read from huge pages: the best of several rounds and of one, two and four
/// streams a thread, since machines differ in what they like; NaN if there is no memory for the measurement.
pub fn bandwidth(threads: usize) -> f64 {
    let Some(mut room) = Room::new(BYTES) else { return f64::NAN };
    room.bytes_mut().fill(1);
    let lines = room.bytes().as_chunks::<LINE>().0;
    let mut pool = Pool::new(threads);
    let mut best = 0.0f64;
    for read in [read::<1>, read::<2>, read::<4>].repeat(ROUNDS) {
        let start = Instant::now();
        pool.run(&|member| {
            black_box(read(&lines[member.share(lines.len(), 1)]));
        });
        best = best.max(1e-9 * BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Adds up all numbers, a line of every stream in turn.
fn read<const STREAMS: usize>(lines: &[[u8; LINE]]) -> u64 {
    let mut streams = lines.chunks_exact((lines.len() / STREAMS).max(1));
    let streams: [&[[u8; LINE]]; STREAMS] = std::array::from_fn(|_| streams.next().unwrap_or(&[]));
    simd(
        #[inline(always)]
        || {
            let mut sums = [[0u64; LINE / 8]; STREAMS];
            for at in 0..streams[0].len() {
                for (sums, stream) in sums.iter_mut().zip(streams) {
                    prefetch(stream.as_ptr().wrapping_add(at + AHEAD).cast());
                    for (sum, number) in sums.iter_mut().zip(stream[at].as_chunks::<8>().0) {
                        *sum = sum.wrapping_add(u64::from_ne_bytes(*number));
                    }
                }
            }
            sums.as_flattened().iter().fold(0u64, |sum, s| sum.wrapping_add(*s))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read_once() {
        let lines: Vec<[u8; LINE]> = (0..24).map(|i| [i; LINE]).collect();
        let want: u64 = (0..24u64).map(|i| (i * 0x0101_0101_0101_0101).wrapping_mul(8)).fold(0, u64::wrapping_add);
        assert_eq!([read::<1>(&lines), read::<2>(&lines), read::<4>(&lines)], [want; 3]);
    }
}
