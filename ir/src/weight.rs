//! Weight expressions: what a weight *is*, as a lazy term over checkpoint tensors. Nothing here touches numbers.

use crate::id::{DataId, WeightId};
use crate::ty::{Dim, Group, Layout, Name, Type};

/// One weight of a region: a lazy expression and its type.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// The name for people; `None` for a sub-expression that prints inside its parent.
    pub name: Option<Name>,
    /// The term.
    pub expr: WeightExpr,
    /// Its type. Float terms are computed in f32 and rounded once, to the element type of the outermost float term.
    pub ty: Type,
}

/// A lazy expression over tensors. Axes count from 0, outermost first; matrices are `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightExpr {
    /// `"name"`: a float tensor of the checkpoint, relative to the region's prefix.
    Source(Name),
    /// `packed.LAYOUT("name")`: a quantized tensor as stored, its parts at `name` plus the layout's suffixes.
    Packed {
        /// The tensor's stem, relative to the region's prefix.
        tensor: Name,
        /// Which parts there are and how they lie.
        layout: Layout,
    },
    /// `$g` in the signature of a fused body: bound by the call's operand at this position.
    Param(usize),
    /// `mul.AXIS(w, #s)`: channel `c` of `axis` times `s[c]`. In a stack of matrices, `#s` may hold the factors of each
    /// matrix, one run after the other.
    Mul {
        /// The scaled axis.
        axis: usize,
        /// The term.
        of: WeightId,
        /// The factors.
        by: DataRef,
    },
    /// `div.AXIS(w, #s)`: channel `c` of `axis` divided by `s[c]`, likewise.
    Div {
        /// The scaled axis.
        axis: usize,
        /// The term.
        of: WeightId,
        /// The divisors.
        by: DataRef,
    },
    /// `offset(w, c)`: `w + c`, element by element.
    Offset {
        /// The term.
        of: WeightId,
        /// The constant.
        by: f64,
    },
    /// `cat.AXIS(a, b, …)`: concatenation. Along every axis but the last quantized terms of one type concatenate too.
    Cat {
        /// The joined axis.
        axis: usize,
        /// The parts, in order.
        parts: Vec<WeightId>,
    },
    /// `stack(a, b, …)`: equal terms along a new axis 0: the matrices of a layer's experts.
    Stack(Vec<WeightId>),
    /// `rows(w, start, len)`: a slice of axis 0.
    Rows {
        /// The term.
        of: WeightId,
        /// First row.
        start: u64,
        /// Number of rows.
        len: u64,
    },
    /// `transpose(w)`: a matrix with its two axes exchanged.
    Transpose(WeightId),
    /// `clip(w, #lo, #hi, GROUP)`: each group of each row limited to `[lo, hi]`, both `[rows, groups]`; the rows of a
    /// stack are counted through.
    Clip {
        /// The term.
        of: WeightId,
        /// Lower bounds.
        lo: DataId,
        /// Upper bounds.
        hi: DataId,
        /// The run of elements that shares a bound.
        group: Group,
    },
    /// `quant(w)`: rounded to the nearest code of this weight's own (quantized) type.
    Quant(WeightId),
    /// `codes(w, #q, #s, #z)`: the codes of this weight's own (quantized) type that a pass chose to stand for `w`, whose
    /// numbers are not needed any more. The rows of a stack are counted through.
    Codes {
        /// The float term that the codes stand for.
        of: WeightId,
        /// Stored codes, unsigned, `[rows, cols]`.
        codes: DataId,
        /// Steps, `[rows, groups]`.
        scales: DataId,
        /// Stored codes of 0, `[rows, groups]`.
        zeros: DataId,
    },
    /// `pack(w)`: the quantized term in the layout that this weight's type names.
    Pack(WeightId),
}

impl WeightExpr {
    /// The terms directly below.
    pub fn children(&self) -> &[WeightId] {
        match self {
            WeightExpr::Source(_) | WeightExpr::Packed { .. } | WeightExpr::Param(_) => &[],
            WeightExpr::Mul { of, .. }
            | WeightExpr::Div { of, .. }
            | WeightExpr::Offset { of, .. }
            | WeightExpr::Rows { of, .. }
            | WeightExpr::Transpose(of)
            | WeightExpr::Clip { of, .. }
            | WeightExpr::Codes { of, .. }
            | WeightExpr::Quant(of)
            | WeightExpr::Pack(of) => std::slice::from_ref(of),
            WeightExpr::Cat { parts, .. } | WeightExpr::Stack(parts) => parts,
        }
    }

    /// The same term with its children replaced, in order, by `f`.
    #[must_use]
    pub fn map_children(&self, mut f: impl FnMut(WeightId) -> WeightId) -> Self {
        let mut expr = self.clone();
        match &mut expr {
            WeightExpr::Source(_) | WeightExpr::Packed { .. } | WeightExpr::Param(_) => {}
            WeightExpr::Mul { of, .. }
            | WeightExpr::Div { of, .. }
            | WeightExpr::Offset { of, .. }
            | WeightExpr::Rows { of, .. }
            | WeightExpr::Transpose(of)
            | WeightExpr::Clip { of, .. }
            | WeightExpr::Codes { of, .. }
            | WeightExpr::Quant(of)
            | WeightExpr::Pack(of) => *of = f(*of),
            WeightExpr::Cat { parts, .. } | WeightExpr::Stack(parts) => parts.iter_mut().for_each(|p| *p = f(*p)),
        }
        expr
    }

    /// The data entries directly used.
    pub fn data(&self) -> Vec<DataId> {
        match self {
            WeightExpr::Mul { by, .. } | WeightExpr::Div { by, .. } => vec![by.id],
            WeightExpr::Clip { lo, hi, .. } => vec![*lo, *hi],
            WeightExpr::Codes { codes, scales, zeros, .. } => vec![*codes, *scales, *zeros],
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Offset { .. }
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => Vec::new(),
        }
    }

    /// The same term with its data entries replaced by what `f` says.
    #[must_use]
    pub fn map_data(&self, f: impl Fn(DataId) -> DataId) -> Self {
        let mut expr = self.clone();
        match &mut expr {
            WeightExpr::Mul { by, .. } | WeightExpr::Div { by, .. } => by.id = f(by.id),
            WeightExpr::Clip { lo, hi, .. } => (*lo, *hi) = (f(*lo), f(*hi)),
            WeightExpr::Codes { codes, scales, zeros, .. } => {
                (*codes, *scales, *zeros) = (f(*codes), f(*scales), f(*zeros));
            }
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Offset { .. }
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => {}
        }
        expr
    }

    /// The shape that the term has, from the types of its children; `None` where the term does not determine it
    /// (sources, packed tensors and parameters take their shape from the definition).
    ///
    /// # Errors
    /// A sentence that says why the children do not fit.
    pub fn infer_shape(
        &self,
        child: impl Fn(WeightId) -> Type,
        data: impl Fn(DataId) -> Vec<u64>,
    ) -> Result<Option<Vec<Dim>>, String> {
        let scaled = |of: &WeightId, axis: usize, by: &DataRef| {
            let ty = child(*of);
            let Some(dim) = ty.shape.get(axis).and_then(Dim::as_const) else {
                return Err(format!("axis {axis} of {ty} is not a constant axis"));
            };
            let entry: u64 = data(by.id).iter().product();
            let len = by.map.len(entry);
            if len != dim && Some(len) != ty.channels_of_all(axis) {
                return Err(format!("{len} factors for axis {axis} of {ty}, which has {dim} channels"));
            }
            float_only(&ty)?;
            Ok(Some(ty.shape))
        };
        match self {
            WeightExpr::Source(_) | WeightExpr::Packed { .. } | WeightExpr::Param(_) => Ok(None),
            WeightExpr::Mul { axis, of, by } | WeightExpr::Div { axis, of, by } => scaled(of, *axis, by),
            WeightExpr::Offset { of, .. } | WeightExpr::Quant(of) => {
                let ty = child(*of);
                float_only(&ty)?;
                Ok(Some(ty.shape))
            }
            WeightExpr::Pack(of) => {
                let ty = child(*of);
                if ty.elem.quant().is_none() {
                    return Err(format!("only a quantized weight can be packed, this is {ty}"));
                }
                Ok(Some(ty.shape))
            }
            WeightExpr::Cat { axis, parts } => cat_shape(*axis, &parts.iter().map(|p| child(*p)).collect::<Vec<_>>()),
            WeightExpr::Stack(parts) => stack_shape(&parts.iter().map(|p| child(*p)).collect::<Vec<_>>()),
            WeightExpr::Rows { of, start, len } => {
                let ty = child(*of);
                let rows = ty.shape.first().and_then(Dim::as_const).unwrap_or(0);
                if start.checked_add(*len).is_none_or(|end| end > rows) {
                    return Err(format!("rows {start}..{start}+{len} of {ty}, which has {rows} rows"));
                }
                let mut shape = ty.shape;
                shape[0] = Dim::Const(*len);
                Ok(Some(shape))
            }
            WeightExpr::Transpose(of) => {
                let ty = child(*of);
                float_only(&ty)?;
                match ty.shape.as_slice() {
                    [a, b] => Ok(Some(vec![b.clone(), a.clone()])),
                    _ => Err(format!("only a matrix can be transposed, this is {ty}")),
                }
            }
            WeightExpr::Clip { of, lo, hi, group } => {
                let ty = child(*of);
                float_only(&ty)?;
                let Some((rows, cols)) = ty.matrix() else {
                    return Err(format!("only a matrix can be clipped, this is {ty}"));
                };
                let want = [rows as u64, group.count(cols) as u64];
                if data(*lo) != want || data(*hi) != want {
                    return Err(format!("clip bounds of {ty} must be [{},{}]", want[0], want[1]));
                }
                Ok(Some(ty.shape))
            }
            WeightExpr::Codes { of, codes, scales, zeros } => {
                let ty = child(*of);
                float_only(&ty)?;
                let Some((rows, cols)) = ty.matrix() else {
                    return Err(format!("only a matrix has codes, this is {ty}"));
                };
                if data(*codes) != [rows as u64, cols as u64] {
                    return Err(format!("the codes of {ty} must be [{rows},{cols}]"));
                }
                let (scales, zeros) = (data(*scales), data(*zeros));
                if scales != zeros || scales.len() != 2 || scales[0] != rows as u64 {
                    return Err(format!("the scales and zeros of {ty} must be [{rows},groups]"));
                }
                Ok(Some(ty.shape))
            }
        }
    }
}

fn float_only(ty: &Type) -> Result<(), String> {
    if ty.elem.is_float() { Ok(()) } else { Err(format!("a float weight is needed here, this is {ty}")) }
}

fn stack_shape(parts: &[Type]) -> Result<Option<Vec<Dim>>, String> {
    let [first, rest @ ..] = parts else { return Err("stack of nothing".into()) };
    match rest.iter().find(|p| p.elem != first.elem || p.shape != first.shape) {
        Some(other) => Err(format!("{other} does not stack on {first}")),
        None => Ok(Some([Dim::Const(parts.len() as u64)].into_iter().chain(first.shape.iter().cloned()).collect())),
    }
}

fn cat_shape(axis: usize, parts: &[Type]) -> Result<Option<Vec<Dim>>, String> {
    let [first, rest @ ..] = parts else { return Err("cat of nothing".into()) };
    if axis >= first.rank() {
        return Err(format!("{first} has no axis {axis}"));
    }
    if first.elem.quant().is_some() && axis + 1 == first.rank() {
        return Err("quantized weights concatenate row by row, not along their groups".into());
    }
    let mut total = first.shape[axis].as_const().ok_or("cat along a symbolic axis")?;
    for part in rest {
        let same = part.rank() == first.rank()
            && part.elem == first.elem
            && part.shape.iter().zip(&first.shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
        if !same {
            return Err(format!("{part} does not concatenate with {first} along axis {axis}"));
        }
        let len = part.shape[axis].as_const().ok_or("cat along a symbolic axis")?;
        total = total.checked_add(len).ok_or("cat is too long")?;
    }
    let mut shape = first.shape.clone();
    shape[axis] = Dim::Const(total);
    Ok(Some(shape))
}

/// Factors for the channels of one axis, taken from a data vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DataRef {
    /// The vector.
    pub id: DataId,
    /// Which entry belongs to which channel.
    pub map: DataMap,
}

/// Which entry of a vector belongs to a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataMap {
    /// `#s`: channel `c` has entry `c`.
    Whole,
    /// `tie(#s, WIDTH, TIMES)`: each run of `width` entries (a key/value head) serves `times` consecutive runs of
    /// channels (its query heads).
    Tie {
        /// Entries a run.
        width: u64,
        /// Repetitions of each run.
        times: u64,
    },
    /// `within(#s, START, TOTAL)`: channels from `start` have the entries, all others of the `total` channels have 1.
    Within {
        /// First channel with an entry.
        start: u64,
        /// Number of channels.
        total: u64,
    },
}

impl DataMap {
    /// The number of channels covered by a vector of `entries`.
    pub fn len(self, entries: u64) -> u64 {
        match self {
            DataMap::Whole => entries,
            DataMap::Tie { times, .. } => entries.saturating_mul(times),
            DataMap::Within { total, .. } => total,
        }
    }

    /// The entry of `channel` in a vector of `entries`, or `None` where the factor is 1.
    pub fn entry(self, channel: u64, entries: u64) -> Option<u64> {
        match self {
            DataMap::Whole => Some(channel),
            DataMap::Tie { width, times } => {
                let (width, times) = (width.max(1), times.max(1));
                Some((channel / width / times) * width + channel % width)
            }
            DataMap::Within { start, .. } => channel.checked_sub(start).filter(|c| *c < entries),
        }
    }
}
