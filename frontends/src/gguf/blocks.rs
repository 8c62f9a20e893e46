//! GGUF element types and their decoding to f32: plain floats, and blocks of quantized integers with their scales.
//!
//! A block holds 32 elements (`q4_0` … `q8_0`) or 256 in 8 or 16 sub-blocks (`q4_k`, `q5_k`, `q6_k`). Names and byte
//! layouts are those of the ggml library.

use half::{bf16, f16};

/// How the elements of a GGUF tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// 4-byte float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// `d · (q − 8)`, 4 bits.
    Q4_0,
    /// `d · q + m`, 4 bits.
    Q4_1,
    /// `d · (q − 16)`, 5 bits.
    Q5_0,
    /// `d · q + m`, 5 bits.
    Q5_1,
    /// `d · q`, 8 bits signed.
    Q8_0,
    /// `d · s · q − dm · m`, 4 bits, 8 sub-blocks with 6-bit scales and minima.
    Q4K,
    /// As `Q4K` with 5 bits.
    Q5K,
    /// `d · s · (q − 32)`, 6 bits, 16 sub-blocks with 8-bit scales.
    Q6K,
}

/// Every readable type with the id that files give it and its name.
const TYPES: [(u32, GgmlType, &str); 11] = [
    (0, GgmlType::F32, "F32"),
    (1, GgmlType::F16, "F16"),
    (2, GgmlType::Q4_0, "Q4_0"),
    (3, GgmlType::Q4_1, "Q4_1"),
    (6, GgmlType::Q5_0, "Q5_0"),
    (7, GgmlType::Q5_1, "Q5_1"),
    (8, GgmlType::Q8_0, "Q8_0"),
    (12, GgmlType::Q4K, "Q4_K"),
    (13, GgmlType::Q5K, "Q5_K"),
    (14, GgmlType::Q6K, "Q6_K"),
    (30, GgmlType::Bf16, "BF16"),
];

/// Types that exist but are not read, for the error message.
const OTHERS: [(u32, &str); 14] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (29, "IQ1_M"),
];

impl GgmlType {
    /// The type of this id in a file.
    ///
    /// # Errors
    /// The name of a type that is not read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        match TYPES.iter().find(|(i, ..)| *i == id) {
            Some((_, ty, _)) => Ok(*ty),
            None => Err(OTHERS
                .iter()
                .find(|(i, _)| *i == id)
                .map_or_else(|| format!("type {id}"), |(_, name)| (*name).to_owned())),
        }
    }

    /// The names of all types that are read.
    pub fn known() -> String {
        TYPES.map(|(_, _, name)| name).join(", ")
    }

    /// Elements and bytes of one block.
    pub fn block(self) -> (u64, u64) {
        match self {
            GgmlType::F32 => (1, 4),
            GgmlType::F16 | GgmlType::Bf16 => (1, 2),
            GgmlType::Q4_0 => (32, 18),
            GgmlType::Q4_1 => (32, 20),
            GgmlType::Q5_0 => (32, 22),
            GgmlType::Q5_1 => (32, 24),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q4K => (256, 144),
            GgmlType::Q5K => (256, 176),
            GgmlType::Q6K => (256, 210),
        }
    }

    /// The bytes of a tensor of `elements` whose rows have `row` of them; `None` if the rows are not whole blocks or
    /// the number overflows.
    pub fn bytes(self, elements: u64, row: u64) -> Option<u64> {
        let (per, size) = self.block();
        if !row.is_multiple_of(per) {
            return None;
        }
        (elements / per).checked_mul(size)
    }

    /// Decodes whole blocks to f32. Bytes after the last whole block are not read.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            GgmlType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            GgmlType::F16 => bytes.as_chunks::<2>().0.iter().map(|b| half(*b)).collect(),
            GgmlType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            GgmlType::Q4_0 => blocks::<18, 32>(bytes, |b, out| {
                let (d, q) = (half([b[0], b[1]]), &b[2..]);
                nibbles(q, out, |q, _| d * (f32::from(q) - 8.0));
            }),
            GgmlType::Q4_1 => blocks::<20, 32>(bytes, |b, out| {
                let (d, m, q) = (half([b[0], b[1]]), half([b[2], b[3]]), &b[4..]);
                nibbles(q, out, |q, _| d * f32::from(q) + m);
            }),
            GgmlType::Q5_0 => blocks::<22, 32>(bytes, |b, out| {
                let (d, high, q) = (half([b[0], b[1]]), u32::from_le_bytes([b[2], b[3], b[4], b[5]]), &b[6..]);
                nibbles(q, out, |q, i| d * (f32::from(fifth(q, high, i)) - 16.0));
            }),
            GgmlType::Q5_1 => blocks::<24, 32>(bytes, |b, out| {
                let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
                let (high, q) = (u32::from_le_bytes([b[4], b[5], b[6], b[7]]), &b[8..]);
                nibbles(q, out, |q, i| d * f32::from(fifth(q, high, i)) + m);
            }),
            GgmlType::Q8_0 => blocks::<34, 32>(bytes, |b, out| {
                let d = half([b[0], b[1]]);
                for (x, q) in out.iter_mut().zip(&b[2..]) {
                    *x = d * f32::from(q.cast_signed());
                }
            }),
            GgmlType::Q4K => blocks::<144, 256>(bytes, |b, out| sub_blocks(b, &b[16..], &[], out)),
            GgmlType::Q5K => blocks::<176, 256>(bytes, |b, out| sub_blocks(b, &b[48..], &b[16..48], out)),
            GgmlType::Q6K => blocks::<210, 256>(bytes, q6_k),
        }
    }
}

impl GgmlType {
    /// Whether its numbers were rounded to fewer than 16 bits.
    pub fn is_quantized(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => false,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Q4K | Self::Q5K | Self::Q6K => true,
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(TYPES.iter().find(|(_, ty, _)| ty == self).map_or("?", |(_, _, name)| name))
    }
}

fn half(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    decode: impl Fn(&[u8; BYTES], &mut [f32]),
) -> Vec<f32> {
    let blocks = bytes.as_chunks::<BYTES>().0;
    let mut out = vec![0.0; blocks.len() * ELEMENTS];
    for (block, out) in blocks.iter().zip(out.chunks_mut(ELEMENTS)) {
        decode(block, out);
    }
    out
}

/// Low nibbles are the first half of the elements, high nibbles the second. `f` gets nibble and element number.
fn nibbles(packed: &[u8], out: &mut [f32], f: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(packed.len());
    for (i, byte) in packed.iter().enumerate() {
        low[i] = f(byte & 15, i);
        high[i] = f(byte >> 4, i + packed.len());
    }
}

/// A nibble with the fifth bit that `high` holds for element `i`.
fn fifth(nibble: u8, high: u32, i: usize) -> u8 {
    nibble | ((((high >> i) & 1) as u8) << 4)
}

/// The 6-bit scale and minimum of sub-block `j < 8`: the first four pairs take the low six bits of bytes `j` and
/// `j + 4`, the others four bits each of byte `j + 4` and their two top bits from the first eight bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (s, m) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (f32::from(s), f32::from(m))
}

/// `Q4_K` and, where `high` has the fifth bits, `Q5_K`: each 32 bytes of `low` hold sub-block `2p` in their low and
/// `2p + 1` in their high nibbles; bit `j` of byte `l` of `high` belongs to element `l` of sub-block `j`.
fn sub_blocks(block: &[u8], low: &[u8], high: &[u8], out: &mut [f32]) {
    let (d, dm, packed) = (half([block[0], block[1]]), half([block[2], block[3]]), &block[4..16]);
    for (j, out) in out.chunks_mut(32).enumerate() {
        let (s, m) = scale_and_min(packed, j);
        let (s, m) = (d * s, dm * m);
        let bytes = &low[j / 2 * 32..][..32];
        for (l, (x, byte)) in out.iter_mut().zip(bytes).enumerate() {
            let nibble = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            let top = high.get(l).map_or(0, |h| (h >> j) & 1);
            *x = s * f32::from(nibble | (top << 4)) - m;
        }
    }
}

/// Two halves of 128 elements. In each, element `32k + l` has its low four bits in nibble `k / 2` of byte
/// `32 (k % 2) + l` and its high two bits at `2k` of byte `l`; sixteen elements share a signed 8-bit scale.
fn q6_k(block: &[u8; 210], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half([block[208], block[209]]);
    for (n, out) in out.chunks_mut(128).enumerate() {
        for (i, x) in out.iter_mut().enumerate() {
            let (k, l) = (i / 32, i % 32);
            let byte = low[64 * n + 32 * (k % 2) + l];
            let nibble = if k < 2 { byte & 15 } else { byte >> 4 };
            let top = (high[32 * n + l] >> (2 * k)) & 3;
            let scale = f32::from(scales[8 * n + i / 16].cast_signed());
            *x = d * scale * (f32::from(nibble | (top << 4)) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h(v: f32) -> [u8; 2] {
        f16::from_f32(v).to_le_bytes()
    }

    #[test]
    fn q4_0_low_nibbles_come_first() {
        let mut b = h(0.5).to_vec();
        b.extend((0..16u8).map(|i| i | ((15 - i) << 4)));
        let x = GgmlType::Q4_0.decode(&b);
        assert_eq!((x[0], x[15], x[16], x[31]), (-4.0, 3.5, 3.5, -4.0));
    }

    #[test]
    fn q4_1_adds_the_minimum() {
        let b = [&h(2.0)[..], &h(-1.0), &[0x31; 16]].concat();
        let x = GgmlType::Q4_1.decode(&b);
        assert_eq!((x[0], x[16]), (1.0, 5.0));
    }

    #[test]
    fn q5_fifth_bits_follow_element_order() {
        let high = (1u32 << 3) | (1 << 20);
        let b = [&h(1.0)[..], &high.to_le_bytes(), &[0x21; 16]].concat();
        let x = GgmlType::Q5_0.decode(&b);
        assert_eq!((x[0], x[3], x[16], x[20]), (-15.0, 1.0, -14.0, 2.0));
        let b = [&h(1.0)[..], &h(0.25), &high.to_le_bytes(), &[0x21; 16]].concat();
        let x = GgmlType::Q5_1.decode(&b);
        assert_eq!((x[0], x[3], x[16], x[20]), (1.25, 17.25, 2.25, 18.25));
    }

    #[test]
    fn q8_0_is_signed() {
        let mut b = h(0.5).to_vec();
        b.extend([127u8, 128, 255].iter().chain(&[0; 29]));
        let x = GgmlType::Q8_0.decode(&b);
        assert_eq!(&x[..4], &[63.5, -64.0, -0.5, 0.0]);
    }

    /// Scales 1..8 and minima 11..18 in the 12 packed bytes, with top bits set in the last four pairs.
    fn packed() -> ([u8; 12], [f32; 8], [f32; 8]) {
        let s = [1u8, 2, 3, 4, 37, 38, 39, 63];
        let m = [11u8, 12, 13, 14, 47, 48, 49, 62];
        let mut b = [0u8; 12];
        for j in 0..4 {
            b[j] = s[j] | ((s[j + 4] >> 4) << 6);
            b[j + 4] = m[j] | ((m[j + 4] >> 4) << 6);
            b[j + 8] = (s[j + 4] & 15) | ((m[j + 4] & 15) << 4);
        }
        (b, s.map(f32::from), m.map(f32::from))
    }

    #[test]
    fn q4_k_has_a_scale_and_a_minimum_a_sub_block() {
        let (p, s, m) = packed();
        let mut b = [&h(0.5)[..], &h(0.25), &p].concat();
        b.extend([0x95; 128]);
        let x = GgmlType::Q4K.decode(&b);
        for j in 0..8 {
            let q = if j % 2 == 0 { 5.0 } else { 9.0 };
            assert_eq!(x[32 * j + 7], 0.5 * s[j] * q - 0.25 * m[j], "sub-block {j}");
        }
    }

    #[test]
    fn q5_k_takes_the_fifth_bit_of_its_sub_block() {
        let (p, s, m) = packed();
        let mut b = [&h(0.5)[..], &h(0.25), &p].concat();
        let mut high = [0u8; 32];
        high[7] = 0b0100_1000;
        b.extend(high);
        b.extend([0x95; 128]);
        let x = GgmlType::Q5K.decode(&b);
        for j in 0..8 {
            let q = if j % 2 == 0 { 5.0 } else { 9.0 } + if j == 3 || j == 6 { 16.0 } else { 0.0 };
            assert_eq!(x[32 * j + 7], 0.5 * s[j] * q - 0.25 * m[j], "sub-block {j}");
            assert_eq!(x[32 * j + 8], 0.5 * s[j] * if j % 2 == 0 { 5.0 } else { 9.0 } - 0.25 * m[j]);
        }
    }

    /// Encodes element by element from the definition and decodes again.
    #[test]
    fn q6_k_round_trips() {
        let q: Vec<u8> = (0..256u32).map(|i| ((i * 37 + 11) % 64) as u8).collect();
        let scales: Vec<i8> = (0..16).map(|i| i * 5 - 40).collect();
        let mut b = vec![0u8; 210];
        for (i, v) in q.iter().enumerate() {
            let (n, k, l) = (i / 128, i % 128 / 32, i % 32);
            b[64 * n + 32 * (k % 2) + l] |= (v & 15) << if k < 2 { 0 } else { 4 };
            b[128 + 32 * n + l] |= (v >> 4) << (2 * k);
        }
        for (i, s) in scales.iter().enumerate() {
            b[192 + i] = s.cast_unsigned();
        }
        b[208..].copy_from_slice(&h(0.125));
        let x = GgmlType::Q6K.decode(&b);
        for i in 0..256 {
            assert_eq!(x[i], 0.125 * f32::from(scales[i / 16]) * (f32::from(q[i]) - 32.0), "element {i}");
        }
    }

    #[test]
    fn plain_floats() {
        assert_eq!(GgmlType::F32.decode(&1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(GgmlType::F16.decode(&h(1.5)), [1.5]);
        assert_eq!(GgmlType::Bf16.decode(&bf16::from_f32(-2.0).to_le_bytes()), [-2.0]);
    }

    #[test]
    fn sizes_need_whole_blocks() {
        assert_eq!(GgmlType::Q4K.bytes(512, 256), Some(288));
        assert_eq!(GgmlType::Q4_0.bytes(40, 40), None);
        assert_eq!(GgmlType::from_id(10), Err("Q2_K".to_owned()));
    }
}
