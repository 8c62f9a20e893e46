//! What ONNX ops mean on numbers that are at hand. See [`super::numbers`].

use super::numbers::{Numbers, axis, broadcast, count, place};
use super::proto::{Attribute, Node};

type Made = Result<Numbers, String>;

/// An integer attribute.
pub(super) fn int(node: &Node, name: &str) -> Option<i64> {
    match node.attributes.get(name) {
        Some(Attribute::Int(n)) => Some(*n),
        Some(_) | None => None,
    }
}

/// A list of integers: an attribute of earlier op sets, an operand of later ones.
pub(super) fn ints(node: &Node, name: &str, operand: Option<&Numbers>) -> Option<Vec<i64>> {
    match node.attributes.get(name) {
        Some(Attribute::Ints(list)) => Some(list.clone()),
        Some(_) | None => operand.map(Numbers::ints),
    }
}

/// `Shape`: all axes, or those from `start` to `end`.
pub(super) fn shape(node: &Node, of: &[usize]) -> Numbers {
    let at = |name: &str, usual: usize| match int(node, name) {
        Some(i) if i < 0 => of.len().saturating_sub(usize::try_from(i.unsigned_abs()).unwrap_or(usize::MAX)),
        Some(i) => usize::try_from(i).unwrap_or(usize::MAX).min(of.len()),
        None => usual,
    };
    Numbers::list(of.get(at("start", 0)..at("end", of.len())).unwrap_or_default().iter().copied())
}

/// The shape that `Reshape` makes of `old`.
pub(super) fn reshape(node: &Node, old: &[usize], target: &[i64]) -> Result<Vec<usize>, String> {
    let keep = int(node, "allowzero").unwrap_or(0) == 0;
    let mut shape = Vec::with_capacity(target.len());
    for (i, d) in target.iter().enumerate() {
        shape.push(match d {
            0 if keep => *old.get(i).ok_or("a reshape keeps an axis that is not there")?,
            -1 => 1,
            d => usize::try_from(*d).map_err(|_| format!("a reshape to {target:?}"))?,
        });
    }
    if let Some(open) = target.iter().position(|d| *d == -1) {
        shape[open] = count(old)?.checked_div(count(&shape)?).ok_or("a reshape of nothing")?;
    }
    Ok(shape)
}

/// The axes of `Unsqueeze`, in the result.
pub(super) fn unsqueezed(shape: &[usize], axes: &[i64]) -> Result<Vec<usize>, String> {
    let rank = shape.len() + axes.len();
    let mut at: Vec<usize> = axes.iter().map(|a| axis(*a, rank)).collect::<Result<_, _>>()?;
    at.sort_unstable();
    at.dedup();
    Ok(at)
}

/// The axes that `Squeeze` takes away.
pub(super) fn squeezed(shape: &[usize], axes: Option<Vec<i64>>) -> Result<Vec<usize>, String> {
    match axes {
        Some(axes) => axes.iter().map(|a| axis(*a, shape.len())).collect(),
        None => Ok((0..shape.len()).filter(|i| shape[*i] == 1).collect()),
    }
}

/// `starts`, `ends`, `axes` and `steps` of a `Slice`.
pub(super) fn slices(rank: usize, rest: &[Option<&Numbers>]) -> Result<Vec<(usize, i64, i64, i64)>, String> {
    let list = |i: usize| rest.get(i).copied().flatten().map(Numbers::ints);
    let (starts, ends) = (list(0).ok_or("starts are missing")?, list(1).ok_or("ends are missing")?);
    let axes = list(2).unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = list(3).unwrap_or_else(|| vec![1; starts.len()]);
    let rows = starts.into_iter().zip(ends).zip(axes.into_iter().zip(steps));
    rows.map(|((start, end), (a, step))| Ok((axis(a, rank)?, start, end, step))).collect()
}

/// The sizes of the parts of a `Split` of `len`.
pub(super) fn parts(node: &Node, len: usize, operand: Option<&Numbers>) -> Result<Vec<usize>, String> {
    match ints(node, "split", operand) {
        Some(sizes) => sizes.into_iter().map(|s| usize::try_from(s).map_err(|e| e.to_string())).collect(),
        None => {
            let n = node.outputs.len().max(1);
            let size = len.div_ceil(n);
            Ok((0..n).map(|i| size.min(len.saturating_sub(i * size))).collect())
        }
    }
}

/// Applies an op. `None` for one that is not known here.
pub(super) fn apply(node: &Node, inputs: &[Option<&Numbers>]) -> Result<Option<Vec<Numbers>>, String> {
    let x = |i: usize| inputs.get(i).copied().flatten().ok_or_else(|| format!("operand {i} is missing"));
    let one = |made: Made| made.map(|n| Some(vec![n]));
    if let Some(f) = unary(&node.op) {
        return one(Ok(x(0)?.map(f)));
    }
    if let Some((f, truth)) = binary(&node.op) {
        let (a, b) = (x(0)?, x(1)?);
        return one(a.zip(b, truth || (a.whole && b.whole), f));
    }
    let rank = |n: &Numbers| n.shape.len();
    match node.op.as_str() {
        "Identity" | "Dropout" => one(Ok(x(0)?.clone())),
        "Cast" => {
            let (of, to) = (x(0)?, int(node, "to").unwrap_or(1));
            let whole = matches!(to, 2..=7 | 9 | 12 | 13);
            let mut made = match to {
                9 => of.map(|v| f64::from(v != 0.0)),
                _ if whole => of.map(f64::trunc),
                _ => of.clone(),
            };
            made.whole = whole;
            one(Ok(made))
        }
        "Div" => {
            let (a, b) = (x(0)?, x(1)?);
            let whole = a.whole && b.whole;
            one(a.zip(b, whole, |a, b| if whole { (a / b).trunc() } else { a / b }))
        }
        "Where" => {
            let (c, a, b) = (x(0)?, x(1)?, x(2)?);
            let shape = broadcast(&broadcast(&c.shape, &a.shape)?, &b.shape)?;
            let (c, yes, no) = (c.expanded(&shape)?, a.expanded(&shape)?, b.expanded(&shape)?);
            let pairs = c.data.iter().zip(yes.data.iter().zip(&no.data));
            let data = pairs.map(|(c, (yes, no))| if *c != 0.0 { *yes } else { *no }).collect();
            one(Ok(Numbers::new(shape, data, a.whole && b.whole)))
        }
        "Shape" => one(Ok(shape(node, &x(0)?.shape))),
        "Size" => one(Ok(Numbers::scalar(x(0)?.data.len() as f64, true))),
        "Gather" => {
            let of = x(0)?;
            one(of.taken(axis(int(node, "axis").unwrap_or(0), rank(of))?, x(1)?))
        }
        "Unsqueeze" => {
            let of = x(0)?;
            let axes = ints(node, "axes", x(1).ok()).ok_or("axes are missing")?;
            let mut shape = of.shape.clone();
            unsqueezed(&of.shape, &axes)?.into_iter().for_each(|a| shape.insert(a.min(shape.len()), 1));
            one(of.reshaped(shape))
        }
        "Squeeze" => {
            let of = x(0)?;
            let gone = squeezed(&of.shape, ints(node, "axes", x(1).ok()))?;
            let kept = of.shape.iter().enumerate().filter(|(i, _)| !gone.contains(i)).map(|(_, d)| *d);
            one(of.reshaped(kept.collect()))
        }
        "Reshape" => {
            let of = x(0)?;
            one(of.reshaped(reshape(node, &of.shape, &x(1)?.ints())?))
        }
        "Flatten" => {
            let of = x(0)?;
            let at = axis(int(node, "axis").unwrap_or(1), rank(of) + 1)?;
            one(of.reshaped(vec![count(&of.shape[..at])?, count(&of.shape[at..])?]))
        }
        "Transpose" => {
            let of = x(0)?;
            let perm = ints(node, "perm", None).unwrap_or_else(|| (0..rank(of) as i64).rev().collect());
            let perm: Vec<usize> = perm.iter().map(|p| axis(*p, rank(of))).collect::<Result<_, _>>()?;
            one(of.transposed(&perm))
        }
        "Expand" => {
            let target: Vec<usize> = x(1)?.ints().iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect();
            one(x(0)?.expanded(&target))
        }
        "Tile" => {
            let mut out = x(0)?.clone();
            for (a, n) in x(1)?.ints().into_iter().enumerate() {
                let n = usize::try_from(n).map_err(|e| e.to_string())?;
                count(&[out.data.len().max(1), n])?;
                out = Numbers::joined(&vec![&out; n], a)?;
            }
            one(Ok(out))
        }
        "Concat" => {
            let all = (0..inputs.len()).map(x).collect::<Result<Vec<_>, _>>()?;
            let r = all.first().map_or(0, |n| rank(n));
            one(Numbers::joined(&all, axis(int(node, "axis").unwrap_or(0), r)?))
        }
        "Slice" => {
            let mut out = x(0)?.clone();
            for (a, start, end, step) in slices(rank(&out), inputs.get(1..).unwrap_or_default())? {
                out = out.sliced(a, start, end, step)?;
            }
            one(Ok(out))
        }
        "Split" => {
            let of = x(0)?;
            let a = axis(int(node, "axis").unwrap_or(0), rank(of))?;
            let mut at = 0i64;
            let mut out = Vec::new();
            for size in parts(node, of.shape[a], x(1).ok())? {
                out.push(of.sliced(a, at, at + size as i64, 1)?);
                at += size as i64;
            }
            Ok(Some(out))
        }
        "Range" => {
            let [start, end, step] = [x(0)?.only(), x(1)?.only(), x(2)?.only()].map(|v| v.unwrap_or(f64::NAN));
            let n = ((end - start) / step).ceil().max(0.0);
            if n.is_nan() || n > super::numbers::MOST as f64 {
                return Err("a range without end".into());
            }
            let data: Vec<f64> = (0..n as usize).map(|i| start + step * i as f64).collect();
            one(Ok(Numbers::new(vec![data.len()], data, x(0)?.whole)))
        }
        "Trilu" => {
            let of = x(0)?;
            let k = inputs.get(1).copied().flatten().and_then(Numbers::only).unwrap_or(0.0) as i64;
            let upper = int(node, "upper").unwrap_or(1) != 0;
            let [.., _, cols] = of.shape[..] else { return Err("a triangle of no matrix".into()) };
            let rows = of.shape[of.shape.len() - 2].max(1);
            let mut out = of.clone();
            for (i, v) in out.data.iter_mut().enumerate() {
                let (r, c) = ((i / cols.max(1) % rows) as i64, (i % cols.max(1)) as i64);
                if if upper { c - r < k } else { c - r > k } {
                    *v = 0.0;
                }
            }
            one(Ok(out))
        }
        "CumSum" => {
            let of = x(0)?;
            let a = axis(x(1)?.only().unwrap_or(0.0) as i64, rank(of))?;
            if int(node, "exclusive").unwrap_or(0) + int(node, "reverse").unwrap_or(0) != 0 {
                return Ok(None);
            }
            let run: usize = of.shape[a + 1..].iter().product::<usize>().max(1);
            let mut out = of.clone();
            for i in 0..out.data.len() {
                if !(i / run).is_multiple_of(of.shape[a]) {
                    out.data[i] += out.data[i - run];
                }
            }
            one(Ok(out))
        }
        "ReduceMax" | "ReduceMin" | "ReduceSum" | "ReduceMean" | "ReduceProd" => {
            let of = x(0)?;
            let axes = ints(node, "axes", x(1).ok()).unwrap_or_else(|| (0..rank(of) as i64).collect());
            let over: Vec<usize> = axes.iter().map(|a| axis(*a, rank(of))).collect::<Result<_, _>>()?;
            let f = match node.op.as_str() {
                "ReduceMax" => |run: &[f64]| run.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                "ReduceMin" => |run: &[f64]| run.iter().copied().fold(f64::INFINITY, f64::min),
                "ReduceSum" => |run: &[f64]| run.iter().sum::<f64>(),
                "ReduceProd" => |run: &[f64]| run.iter().product::<f64>(),
                _mean => |run: &[f64]| run.iter().sum::<f64>() / run.len().max(1) as f64,
            };
            let out = of.reduced(&over, f)?;
            if int(node, "keepdims").unwrap_or(1) != 0 {
                return one(Ok(out));
            }
            let kept = out.shape.iter().enumerate().filter(|(i, _)| !over.contains(i)).map(|(_, d)| *d);
            one(out.reshaped(kept.collect()))
        }
        "MatMul" => one(x(0)?.product(x(1)?)),
        "ScatterND" => one(scattered(x(0)?, x(1)?, x(2)?)),
        _unknown => Ok(None),
    }
}

/// `ScatterND`: a copy in which the entries that `indices` name are replaced.
fn scattered(of: &Numbers, indices: &Numbers, updates: &Numbers) -> Made {
    let depth = *indices.shape.last().ok_or("indices without axes")?;
    let run: usize = of.shape.get(depth..).ok_or("indices that are too deep")?.iter().product();
    let mut out = of.clone();
    for (n, index) in indices.data.chunks(depth.max(1)).enumerate() {
        let place = index.iter().zip(&of.shape).try_fold(0usize, |at, (i, d)| Some(at * d + place(*i, *d)?));
        let at = place.ok_or("an index is out of range")? * run;
        let new = updates.data.get(n * run..(n + 1) * run).ok_or("updates are missing")?;
        out.data.get_mut(at..at + run).ok_or("an index is out of range")?.copy_from_slice(new);
    }
    Ok(out)
}

fn unary(op: &str) -> Option<fn(f64) -> f64> {
    Some(match op {
        "Neg" => |v| -v,
        "Abs" => f64::abs,
        "Not" => |v| f64::from(v == 0.0),
        "Sqrt" => f64::sqrt,
        "Reciprocal" => |v| 1.0 / v,
        "Exp" => f64::exp,
        "Log" => f64::ln,
        "Cos" => f64::cos,
        "Sin" => f64::sin,
        "Floor" => f64::floor,
        "Ceil" => f64::ceil,
        "Sign" => |v| if v == 0.0 { 0.0 } else { v.signum() },
        "IsNaN" => |v| f64::from(v.is_nan()),
        _other => return None,
    })
}

/// A function of two numbers, and whether it answers a question.
type Binary = (fn(f64, f64) -> f64, bool);

fn binary(op: &str) -> Option<Binary> {
    Some(match op {
        "Add" => (|a, b| a + b, false),
        "Sub" => (|a, b| a - b, false),
        "Mul" => (|a, b| a * b, false),
        "Pow" => (f64::powf, false),
        "Mod" => (f64::rem_euclid, false),
        "Min" => (f64::min, false),
        "Max" => (f64::max, false),
        "Equal" => (|a, b| f64::from(a == b), true),
        "Less" => (|a, b| f64::from(a < b), true),
        "LessOrEqual" => (|a, b| f64::from(a <= b), true),
        "Greater" => (|a, b| f64::from(a > b), true),
        "GreaterOrEqual" => (|a, b| f64::from(a >= b), true),
        "And" => (|a, b| f64::from(a != 0.0 && b != 0.0), true),
        "Or" => (|a, b| f64::from(a != 0.0 || b != 0.0), true),
        "Xor" => (|a, b| f64::from((a != 0.0) != (b != 0.0)), true),
        _other => return None,
    })
}
