//! Types: an element type, a physical layout once one is chosen, and a shape of constant or symbolic dimensions.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::panels::Panels;
use crate::tensor::Stored;
use crate::tiles::Tiles;

/// A short immutable string: a name for people, or a symbolic dimension.
pub type Name = Arc<str>;

/// One axis of a shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dim {
    /// A size known at compile time.
    Const(u64),
    /// A size known when the model runs: `B` (batch), `S` (sequence), …
    Sym(Name),
}

impl Dim {
    /// The size, if it is known at compile time.
    pub fn as_const(&self) -> Option<u64> {
        match self {
            Dim::Const(n) => Some(*n),
            Dim::Sym(_) => None,
        }
    }
}

impl From<u64> for Dim {
    fn from(n: u64) -> Self {
        Dim::Const(n)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Const(n) => write!(f, "{n}"),
            Dim::Sym(s) => f.write_str(s),
        }
    }
}

/// How the elements of one row of a weight share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Group {
    /// One scale for each run of this many elements along the last axis; the last run may be shorter.
    Size(u32),
    /// One scale for a whole row (per output channel).
    Row,
}

impl Group {
    /// The group length for rows of `len` elements.
    pub fn len(self, len: usize) -> usize {
        match self {
            Group::Size(g) => (g as usize).min(len.max(1)),
            Group::Row => len.max(1),
        }
    }

    /// The number of groups in a row of `len` elements.
    pub fn count(self, len: usize) -> usize {
        len.div_ceil(self.len(len))
    }
}

/// A group-quantized integer element: `u4g128` (asymmetric) or `i4g128` (symmetric).
///
/// An asymmetric element decodes as `(code - zero) * scale` with `0 <= code, zero <= 2^bits - 1`; a symmetric one as
/// `code * scale` with `-2^(bits-1) <= code <= 2^(bits-1) - 1`. Scales are f16, one per row and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Quant {
    /// 2, 3, 4 or 8.
    pub bits: u8,
    /// `true` for `i`: no zero point.
    pub symmetric: bool,
    /// How elements share a scale.
    pub group: Group,
}

impl Quant {
    /// The widths that the language knows.
    pub const BITS: [u8; 4] = [2, 3, 4, 8];

    /// Smallest and largest code.
    pub fn code_range(self) -> (i32, i32) {
        if self.symmetric { (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1) } else { (0, (1 << self.bits) - 1) }
    }

    /// Bits stored per weight of a row of `len` elements, scales (f16) and zero points included.
    pub fn bits_per_weight(self, len: usize) -> f64 {
        let overhead = 16.0 + if self.symmetric { 0.0 } else { f64::from(self.bits) };
        f64::from(self.bits) + overhead * self.group.count(len) as f64 / len.max(1) as f64
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.symmetric { 'i' } else { 'u' }, self.bits)?;
        match self.group {
            Group::Size(g) => write!(f, "g{g}"),
            Group::Row => f.write_str("row"),
        }
    }
}

impl std::str::FromStr for Quant {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}` is not a quantized element type such as u4g128, i3g64 or u8row");
        let symmetric = match s.as_bytes().first() {
            Some(b'u') => false,
            Some(b'i') => true,
            _ => return Err(bad()),
        };
        let rest = s.get(1..).ok_or_else(bad)?;
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let bits: u8 = rest[..digits].parse().map_err(|_| bad())?;
        if !Self::BITS.contains(&bits) {
            return Err(format!("{bits} bits are not supported: use 2, 3, 4 or 8"));
        }
        let group = match &rest[digits..] {
            "row" => Group::Row,
            tail => match tail.strip_prefix('g').map(str::parse::<u32>) {
                Some(Ok(g)) if g > 0 => Group::Size(g),
                _ => return Err(bad()),
            },
        };
        Ok(Self { bits, symmetric, group })
    }
}

/// What one element of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Elem {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Token ids and positions.
    I32,
    /// Group-quantized integer.
    Quant(Quant),
}

impl Elem {
    /// Whether it is one of the three float types.
    pub fn is_float(self) -> bool {
        match self {
            Elem::F32 | Elem::F16 | Elem::Bf16 => true,
            Elem::I32 | Elem::Quant(_) => false,
        }
    }

    /// The quantization, if the element is quantized.
    pub fn quant(self) -> Option<Quant> {
        match self {
            Elem::Quant(q) => Some(q),
            Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::I32 => None,
        }
    }

    /// Rounds `v` to what this float type can hold (other types return `v` as it is).
    pub fn round(self, v: f32) -> f32 {
        match self {
            Elem::F16 => half::f16::from_f32(v).to_f32(),
            Elem::Bf16 => half::bf16::from_f32(v).to_f32(),
            Elem::F32 | Elem::I32 | Elem::Quant(_) => v,
        }
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elem::F32 => f.write_str("f32"),
            Elem::F16 => f.write_str("f16"),
            Elem::Bf16 => f.write_str("bf16"),
            Elem::I32 => f.write_str("i32"),
            Elem::Quant(q) => q.fmt(f),
        }
    }
}

impl std::str::FromStr for Elem {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "f32" => Elem::F32,
            "f16" => Elem::F16,
            "bf16" => Elem::Bf16,
            "i32" => Elem::I32,
            other => Elem::Quant(other.parse()?),
        })
    }
}

/// How the codes, scales and zero points of a quantized tensor lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Layout {
    /// `.codes` u8 `[out, ceil(in*bits/8)]`: each row one little-endian bit stream along `in`; `.scales` f16
    /// `[out, groups]`; `.zeros` u8 `[out, groups]` (asymmetric only). Symmetric codes are stored plus `2^(bits-1)`.
    Rows,
    /// AutoAWQ's GEMM layout: `.qweight` i32 `[in, out/8]`, `.qzeros` i32 `[groups, out/8]`, `.scales` f16
    /// `[groups, out]`; nibble `i` of a word holds column `[0,2,4,6,1,3,5,7][i]`. Four bits, asymmetric.
    AwqGemm,
    /// Panels of 16 rows for CPU kernels: `.r16` u8 `[panels, bytes]`. A panel holds every group's scales (16 f16 each)
    /// and, if asymmetric, zero points (16 bytes each), padded to 64 bytes, then blocks of 32 columns: eight quads of
    /// 64 bytes, byte `4 r + i` of quad `p` for row `r` and column `4 p + i`, narrow codes sharing bytes plane by
    /// plane.
    R16,
    /// As `rows`, but every 32 columns in the order of the AWQ paper (section 4.2): byte `e` of 16 holds columns `e`
    /// and
    /// `e + 16`, and rows are padded to whole blocks. Four bits.
    Simd16,
    /// Tiles of 16 rows and 64 columns for tensor cores: `.mma16` u8 `[panels, bytes]`; see [`crate::tiles`].
    Mma16,
}

impl Layout {
    /// Every layout with its name in the text form.
    pub const ALL: [(Layout, &'static str); 5] = [
        (Layout::Rows, "rows"),
        (Layout::AwqGemm, "awq_gemm"),
        (Layout::R16, "r16"),
        (Layout::Simd16, "simd16"),
        (Layout::Mma16, "mma16"),
    ];

    /// The stored parts of a `[rows, cols]` weight: suffix of the tensor's name, storage and shape. Empty when a size
    /// overflows.
    pub fn parts(self, quant: Quant, rows: usize, cols: usize) -> Vec<(&'static str, Stored, Vec<usize>)> {
        let groups = quant.group.count(cols);
        match self {
            Layout::Rows | Layout::Simd16 => {
                let cols = if self == Layout::Simd16 { cols.div_ceil(32).saturating_mul(32) } else { cols };
                let bytes = cols.saturating_mul(usize::from(quant.bits)).div_ceil(8);
                let mut parts =
                    vec![(".codes", Stored::U8, vec![rows, bytes]), (".scales", Stored::F16, vec![rows, groups])];
                if !quant.symmetric {
                    parts.push((".zeros", Stored::U8, vec![rows, groups]));
                }
                parts
            }
            Layout::AwqGemm => vec![
                (".qweight", Stored::I32, vec![cols, rows / 8]),
                (".qzeros", Stored::I32, vec![groups, rows / 8]),
                (".scales", Stored::F16, vec![groups, rows]),
            ],
            Layout::R16 => Panels::of(quant, rows, cols)
                .map(|p| (".r16", Stored::U8, vec![p.panels(), p.panel_bytes()]))
                .into_iter()
                .collect(),
            Layout::Mma16 => Tiles::of(quant, rows, cols)
                .map(|t| (".mma16", Stored::U8, vec![t.panels(), t.panel_bytes()]))
                .into_iter()
                .collect(),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Rows => "rows",
            Layout::AwqGemm => "awq_gemm",
            Layout::R16 => "r16",
            Layout::Simd16 => "simd16",
            Layout::Mma16 => "mma16",
        })
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == s);
        found.map(|(layout, _)| *layout).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, name)| *name).collect();
            format!("`{s}` is not a layout; known: {}", names.join(", "))
        })
    }
}

/// The type of a value or weight: `f16[B,S,4096]`, `u4g128[4096,4096]`, `u4g128@awq_gemm[4096,4096]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    /// What an element is.
    pub elem: Elem,
    /// The physical layout, for quantized weights that have been packed.
    pub layout: Option<Layout>,
    /// The axes, outermost first.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type without a layout.
    pub fn new(elem: Elem, shape: impl IntoIterator<Item = Dim>) -> Self {
        Self { elem, layout: None, shape: shape.into_iter().collect() }
    }

    /// The same shape and layout with another element.
    pub fn with_elem(&self, elem: Elem) -> Self {
        Self { elem, layout: None, shape: self.shape.clone() }
    }

    /// The same element with the last axis replaced.
    pub fn with_last(&self, last: Dim) -> Self {
        let mut ty = Self::new(self.elem, self.shape.iter().cloned());
        if let Some(d) = ty.shape.last_mut() {
            *d = last;
        }
        ty
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The length of the last axis (the channels), if constant.
    pub fn channels(&self) -> Option<u64> {
        self.shape.last().and_then(Dim::as_const)
    }

    /// Rows and columns of a matrix, or of a stack of matrices one below the other, if they are constant.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        match self.const_shape()?.as_slice() {
            [rows @ .., cols] if !rows.is_empty() => {
                Some((rows.iter().try_fold(1usize, |a, b| a.checked_mul(*b))?, *cols))
            }
            _ => None,
        }
    }

    /// The channels along `axis` of all matrices of a stack `[n,out,in]` together, for an axis of the matrices.
    pub fn channels_of_all(&self, axis: usize) -> Option<u64> {
        match (self.shape.as_slice(), axis) {
            ([Dim::Const(n), _, _], 1 | 2) => n.checked_mul(self.shape.get(axis)?.as_const()?),
            _ => None,
        }
    }

    /// How many experts a value `[E,B,S,C]` holds rows for; 1 for any other value.
    pub fn experts(&self) -> u64 {
        match self.shape.as_slice() {
            [Dim::Const(n), _, _, _] => *n,
            _ => 1,
        }
    }

    /// The shape as numbers, if every axis is constant.
    pub fn const_shape(&self) -> Option<Vec<usize>> {
        self.shape.iter().map(|d| d.as_const().and_then(|n| usize::try_from(n).ok())).collect()
    }

    /// The number of elements, if every axis is constant and the product fits.
    pub fn const_len(&self) -> Option<usize> {
        self.const_shape()?.into_iter().try_fold(1usize, usize::checked_mul)
    }
}

impl std::str::FromStr for Type {
    type Err = String;

    /// Reads what [`Type`] prints, without a layout; a dimension that is no number is a symbol.
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}` is not a type such as f32[B,S,48]");
        let (elem, dims) = s.strip_suffix(']').and_then(|s| s.split_once('[')).ok_or_else(bad)?;
        let dim = |d: &str| match d.parse::<u64>() {
            Ok(n) => Ok(Dim::Const(n)),
            Err(_) if !d.is_empty() && d.chars().all(|c| c.is_ascii_alphanumeric()) => Ok(Dim::Sym(d.into())),
            Err(_) => Err(bad()),
        };
        Ok(Self::new(elem.parse()?, dims.split(',').map(dim).collect::<Result<Vec<_>, _>>()?))
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.elem)?;
        if let Some(layout) = self.layout {
            write!(f, "@{layout}")?;
        }
        f.write_str("[")?;
        for (i, dim) in self.shape.iter().enumerate() {
            write!(f, "{}{dim}", if i > 0 { "," } else { "" })?;
        }
        f.write_str("]")
    }
}
