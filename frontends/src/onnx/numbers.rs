//! Small tensors that are computed while a model is read: shapes, positions, masks, tables of angles. An exporter
//! writes these as dozens of ops that have nothing to do with the model's weights or tokens, so they are evaluated.
//!
//! Everything is f64, integers too: they count positions and channels.

/// Most elements of a tensor that is computed here.
pub(super) const MOST: usize = 1 << 22;

/// Most elements of all tensors that are computed for a model.
pub(super) const TOTAL: usize = 1 << 25;

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Numbers {
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<f64>,
    /// Integers and truth values: their division rounds.
    pub(super) whole: bool,
}

type Made = Result<Numbers, String>;

/// Elements of a shape, if that is no more than [`MOST`].
pub(super) fn count(shape: &[usize]) -> Result<usize, String> {
    let n = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    n.filter(|n| *n <= MOST).ok_or_else(|| format!("a tensor of shape {shape:?} is too large to be computed"))
}

fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1usize; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        out[i] = out[i + 1].saturating_mul(shape[i + 1]);
    }
    out
}

/// The shape that two shapes broadcast to.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let dim = |s: &[usize], i: usize| (i + s.len()).checked_sub(rank).and_then(|i| s.get(i)).copied().unwrap_or(1);
    let join = |i| match (dim(a, i), dim(b, i)) {
        (x, y) if x == y => Ok(x),
        (1, y) => Ok(y),
        (x, 1) => Ok(x),
        _differ => Err(format!("shapes {a:?} and {b:?} do not go together")),
    };
    (0..rank).map(join).collect()
}

/// An axis that may count from the end.
pub(super) fn axis(axis: i64, rank: usize) -> Result<usize, String> {
    let at = if axis < 0 { axis.checked_add(rank as i64) } else { Some(axis) };
    at.and_then(|a| usize::try_from(a).ok()).filter(|a| *a < rank).ok_or_else(|| format!("axis {axis} of {rank} axes"))
}

impl Numbers {
    pub(super) fn new(shape: Vec<usize>, data: Vec<f64>, whole: bool) -> Self {
        Self { shape, data, whole }
    }

    pub(super) fn scalar(value: f64, whole: bool) -> Self {
        Self::new(Vec::new(), vec![value], whole)
    }

    pub(super) fn list(values: impl IntoIterator<Item = usize>) -> Self {
        let data: Vec<f64> = values.into_iter().map(|v| v as f64).collect();
        Self::new(vec![data.len()], data, true)
    }

    /// The integers of a list or scalar.
    pub(super) fn ints(&self) -> Vec<i64> {
        self.data.iter().map(|v| *v as i64).collect()
    }

    /// The only number.
    pub(super) fn only(&self) -> Option<f64> {
        match self.data.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// Whether the numbers have the shape.
    pub(super) fn checked(self) -> Made {
        if count(&self.shape)? == self.data.len() {
            Ok(self)
        } else {
            Err(format!("{} numbers for the shape {:?}", self.data.len(), self.shape))
        }
    }

    /// The tensor of `shape` whose element at an index is the one of `self` at `f(index)`.
    fn gathered(&self, shape: Vec<usize>, f: impl Fn(&[usize]) -> Option<usize>) -> Made {
        let n = count(&shape)?;
        let mut index = vec![0; shape.len()];
        let mut data = Vec::with_capacity(n);
        for _ in 0..n {
            let from = f(&index).and_then(|i| self.data.get(i)).ok_or("an index is out of range")?;
            data.push(*from);
            for (i, d) in index.iter_mut().zip(&shape).rev() {
                *i += 1;
                if *i < *d {
                    break;
                }
                *i = 0;
            }
        }
        Ok(Self::new(shape, data, self.whole))
    }

    pub(super) fn expanded(&self, target: &[usize]) -> Made {
        let shape = broadcast(&self.shape, target)?;
        let (own, skip) = (strides(&self.shape), shape.len() - self.shape.len());
        let sizes = self.shape.clone();
        self.gathered(shape, |index| {
            let at = |(i, (d, s)): (&usize, (&usize, &usize))| if *d == 1 { 0 } else { i * s };
            Some(index.get(skip..)?.iter().zip(sizes.iter().zip(&own)).map(at).sum())
        })
    }

    pub(super) fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self::new(self.shape.clone(), self.data.iter().map(|v| f(*v)).collect(), self.whole)
    }

    pub(super) fn zip(&self, other: &Self, whole: bool, f: impl Fn(f64, f64) -> f64) -> Made {
        let shape = broadcast(&self.shape, &other.shape)?;
        let (a, b) = (self.expanded(&shape)?, other.expanded(&shape)?);
        Ok(Self::new(shape, a.data.iter().zip(&b.data).map(|(a, b)| f(*a, *b)).collect(), whole))
    }

    pub(super) fn reshaped(&self, shape: Vec<usize>) -> Made {
        Self::new(shape, self.data.clone(), self.whole).checked()
    }

    pub(super) fn transposed(&self, perm: &[usize]) -> Made {
        let own = strides(&self.shape);
        let shape: Option<Vec<usize>> = perm.iter().map(|p| self.shape.get(*p).copied()).collect();
        let shape = shape.filter(|s| s.len() == self.shape.len()).ok_or("a permutation of other axes")?;
        self.gathered(shape, |index| index.iter().zip(perm).map(|(i, p)| Some(i * own.get(*p)?)).sum())
    }

    /// Entries `start, start + step, …` before `end` of an axis.
    pub(super) fn sliced(&self, axis: usize, start: i64, end: i64, step: i64) -> Made {
        let len = *self.shape.get(axis).ok_or("no such axis")? as i64;
        let picked = picked(len, start, end, step)?;
        let at: Vec<f64> = picked.iter().map(|i| *i as f64).collect();
        self.taken(axis, &Self::new(vec![at.len()], at, true))
    }

    /// `Gather`.
    pub(super) fn taken(&self, axis: usize, indices: &Self) -> Made {
        let own = strides(&self.shape);
        let len = *self.shape.get(axis).ok_or("no such axis")?;
        let rank = indices.shape.len();
        let mut shape = self.shape.get(..axis).unwrap_or_default().to_vec();
        shape.extend(&indices.shape);
        shape.extend(self.shape.get(axis + 1..).unwrap_or_default());
        let inner = strides(&indices.shape);
        self.gathered(shape, |index| {
            let chosen: usize = index.get(axis..axis + rank)?.iter().zip(&inner).map(|(i, s)| i * s).sum();
            let i = *indices.data.get(chosen)?;
            let i = place(i, len)?;
            let before: usize = index.iter().take(axis).zip(&own).map(|(i, s)| i * s).sum();
            let after: usize = index.iter().skip(axis + rank).zip(own.get(axis + 1..)?).map(|(i, s)| i * s).sum();
            Some(before + i * own.get(axis)? + after)
        })
    }

    pub(super) fn joined(parts: &[&Self], axis: usize) -> Made {
        let first = parts.first().ok_or("nothing to join")?;
        let lens: Option<Vec<usize>> = parts.iter().map(|p| p.shape.get(axis).copied()).collect();
        let lens = lens.ok_or("no such axis")?;
        let mut shape = first.shape.clone();
        shape[axis] = lens.iter().sum();
        let outer = count(&shape[..axis])?;
        let mut data = Vec::with_capacity(count(&shape)?);
        for o in 0..outer {
            for part in parts {
                let run = part.data.len() / outer.max(1);
                data.extend_from_slice(part.data.get(o * run..(o + 1) * run).ok_or("parts of other shapes")?);
            }
        }
        Self::new(shape, data, first.whole).checked()
    }

    /// `f` over runs of the axes `over`, which stay with length 1.
    pub(super) fn reduced(&self, over: &[usize], f: impl Fn(&[f64]) -> f64) -> Made {
        let mut order: Vec<usize> = (0..self.shape.len()).filter(|a| !over.contains(a)).collect();
        order.extend(over);
        let turned = self.transposed(&order)?;
        let run = over.iter().map(|a| self.shape[*a]).product::<usize>().max(1);
        let shape = self.shape.iter().enumerate().map(|(i, d)| if over.contains(&i) { 1 } else { *d }).collect();
        Self::new(shape, turned.data.chunks(run).map(f).collect(), self.whole).checked()
    }

    pub(super) fn product(&self, other: &Self) -> Made {
        let (Some([m, k]), Some([l, n])) = (self.shape.last_chunk::<2>(), other.shape.last_chunk::<2>()) else {
            return Err("a product needs matrices".into());
        };
        let (m, k, l, n) = (*m, *k, *l, *n);
        if k != l {
            return Err(format!("a product of {:?} and {:?}", self.shape, other.shape));
        }
        let lead = |s: &[usize]| s.get(..s.len() - 2).unwrap_or_default().to_vec();
        let batch = broadcast(&lead(&self.shape), &lead(&other.shape))?;
        let full = |rows, cols| batch.iter().copied().chain([rows, cols]).collect::<Vec<_>>();
        let (a, b) = (self.expanded(&full(m, k))?, other.expanded(&full(k, n))?);
        let mut data = Vec::with_capacity(count(&full(m, n))?);
        if count(&full(m, n))?.saturating_mul(k) > MOST {
            return Err("a product is too large to be computed".into());
        }
        for g in 0..count(&batch)? {
            for i in 0..m {
                for j in 0..n {
                    data.push((0..k).map(|x| a.data[(g * m + i) * k + x] * b.data[(g * k + x) * n + j]).sum());
                }
            }
        }
        Ok(Self::new(full(m, n), data, self.whole && other.whole))
    }
}

/// An index that may count from the end.
pub(super) fn place(i: f64, len: usize) -> Option<usize> {
    let i = if i < 0.0 { i + len as f64 } else { i };
    (i >= 0.0 && i < len as f64).then_some(i as usize)
}

/// The entries that `start:end:step` picks of `len`.
pub(super) fn picked(len: i64, start: i64, end: i64, step: i64) -> Result<Vec<i64>, String> {
    let from_end = |i: i64| if i < 0 { i.saturating_add(len) } else { i };
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let start = from_end(start).clamp(low.max(0), high);
    let end = if step < 0 && end < -len { -1 } else { from_end(end).clamp(low, high) };
    match step {
        1.. => Ok((start..end).step_by(usize::try_from(step).map_err(|e| e.to_string())?).collect()),
        0 => Err("a slice with step 0".into()),
        _back => Ok((end + 1..=start).rev().step_by(step.unsigned_abs() as usize).collect()),
    }
}
