//! A naive evaluator of regions in f64: one batch, positions are rows. Slow, short and independent of the rest.

use std::collections::BTreeMap;

use awqc_ir::op::{GeluForm, Sdpa};
use awqc_ir::{DataRef, Elem, Node, Op, Operand, Region, ValueId, WeightExpr, WeightId};
use awqc_passes::rtn;

/// Rows of channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn rows(&self) -> usize {
        self.data.len() / self.cols
    }

    fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { cols: self.cols, data: self.data.iter().map(|v| f(*v)).collect() }
    }

    fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let data = self.data.iter().zip(other.data.iter().cycle()).map(|(a, b)| f(*a, *b)).collect();
        Self { cols: self.cols, data }
    }

    fn rows_mut(&mut self, f: impl Fn(usize, &mut [f64])) -> &mut Self {
        self.data.chunks_mut(self.cols).enumerate().for_each(|(i, r)| f(i, r));
        self
    }
}

type Made<'a> = Box<dyn Fn(&str, &[usize]) -> Vec<f32> + 'a>;

/// One evaluation.
pub struct Run<'a> {
    region: &'a Region,
    made: Made<'a>,
    inputs: BTreeMap<ValueId, Matrix>,
}

impl<'a> Run<'a> {
    pub fn new(region: &'a Region, made: Made<'a>, inputs: BTreeMap<ValueId, Matrix>) -> Self {
        Self { region, made, inputs }
    }

    /// A weight's shape and numbers; float terms are not rounded, quantized ones are.
    pub fn weight(&self, id: WeightId) -> (Vec<usize>, Vec<f64>) {
        let w = self.region.weight(id);
        let shape = w.ty.const_shape().unwrap();
        let data = match &w.expr {
            WeightExpr::Source(name) => {
                (self.made)(&self.region.tensor_name(name), &shape).into_iter().map(f64::from).collect()
            }
            WeightExpr::Mul { axis, of, by } => self.scaled(*of, *axis, by, |v, s| v * s),
            WeightExpr::Div { axis, of, by } => self.scaled(*of, *axis, by, |v, s| v / s),
            WeightExpr::Offset { of, by } => self.weight(*of).1.iter().map(|v| v + by).collect(),
            WeightExpr::Rows { of, start, len } => {
                let inner: usize = shape[1..].iter().product();
                let (start, len) = (*start as usize, *len as usize);
                self.weight(*of).1[start * inner..(start + len) * inner].to_vec()
            }
            WeightExpr::Cat { axis: 0, parts } => parts.iter().flat_map(|p| self.weight(*p).1).collect(),
            WeightExpr::Clip { of, lo, hi, group } => {
                let data = |d| self.region.data(d).values.clone().unwrap();
                let (lo, hi, cols) = (data(*lo), data(*hi), shape[1]);
                let at = |i: usize| i / cols * group.count(cols) + i % cols / group.len(cols);
                let clip = |(i, v): (usize, f64)| v.clamp(lo[at(i)].into(), hi[at(i)].into());
                self.weight(*of).1.into_iter().enumerate().map(clip).collect()
            }
            WeightExpr::Quant(of) => {
                let Elem::Quant(quant) = w.ty.elem else { panic!("quant of a float type") };
                let elem = self.region.weight(*of).ty.elem;
                let float: Vec<f32> = self.weight(*of).1.iter().map(|v| elem.round(*v as f32)).collect();
                let decoded = rtn::quantize(&float, shape[0], shape[1], quant).decode();
                decoded.into_iter().map(f64::from).collect()
            }
            WeightExpr::Codes { codes, scales, zeros, .. } => {
                let Elem::Quant(quant) = w.ty.elem else { panic!("codes of a float type") };
                let data = |d| self.region.data(d).values.clone().unwrap();
                let (codes, scales, zeros, cols) = (data(*codes), data(*scales), data(*zeros), shape[1]);
                let at = |i: usize| i / cols * quant.group.count(cols) + i % cols / quant.group.len(cols);
                let decode = |(i, q): (usize, &f32)| f64::from(q - zeros[at(i)]) * f64::from(scales[at(i)]);
                codes.iter().enumerate().map(decode).collect()
            }
            other => panic!("the tests do not use {other:?}"),
        };
        (shape, data)
    }

    fn scaled(&self, of: WeightId, axis: usize, by: &DataRef, f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let s = self.region.data(by.id).values.clone().unwrap();
        let (shape, data) = self.weight(of);
        let inner: usize = shape[axis + 1..].iter().product();
        let factor = |i: usize| {
            by.map.entry((i / inner % shape[axis]) as u64, s.len() as u64).map_or(1.0, |e| s[e as usize].into())
        };
        data.iter().enumerate().map(|(i, v)| f(*v, factor(i))).collect()
    }

    /// Every value.
    pub fn values(&self) -> BTreeMap<ValueId, Matrix> {
        let mut values = self.inputs.clone();
        for (_, node) in self.region.nodes() {
            let x: Vec<&Matrix> = node.operands.iter().filter_map(|o| o.value()).map(|v| &values[&v]).collect();
            let w: Vec<Vec<f64>> = node.operands.iter().filter_map(|o| o.weight()).map(|w| self.weight(w).1).collect();
            let results = self.apply(node, &x, &w);
            values.extend(node.results.iter().copied().zip(results));
        }
        values
    }

    fn apply(&self, node: &Node, x: &[&Matrix], w: &[Vec<f64>]) -> Vec<Matrix> {
        let silu = |v: f64| v / (1.0 + (-v).exp());
        vec![match &node.op {
            Op::Linear(_) => {
                let out = w[0].len() / x[0].cols;
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let row = |r: &[f64]| {
                    let y = |(o, c): (usize, &[f64])| dot(r, c) + w.get(1).map_or(0.0, |b| b[o]);
                    w[0].chunks(x[0].cols).enumerate().map(y).collect::<Vec<f64>>()
                };
                Matrix { cols: out, data: x[0].data.chunks(x[0].cols).flat_map(row).collect() }
            }
            Op::RmsNorm(op) => {
                let width = x[0].cols / op.heads.unwrap_or(1) as usize;
                let mut y = x[0].clone();
                y.rows_mut(|_, row| {
                    for head in row.chunks_mut(width) {
                        let ms = head.iter().map(|v| v * v).sum::<f64>() / width as f64;
                        let gain = |i: usize| w.first().map_or(1.0, |g| g[i] + op.offset);
                        head.iter_mut().enumerate().for_each(|(i, v)| *v = *v / (ms + op.eps).sqrt() * gain(i));
                    }
                });
                y
            }
            Op::LayerNorm(op) => {
                let mut y = x[0].clone();
                y.rows_mut(|_, row| {
                    let n = row.len() as f64;
                    let mean = row.iter().sum::<f64>() / n;
                    let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
                    for (i, v) in row.iter_mut().enumerate() {
                        *v = (*v - mean) / (var + op.eps).sqrt() * w.first().map_or(1.0, |g| g[i]);
                        *v += w.get(1).map_or(0.0, |b| b[i]);
                    }
                });
                y
            }
            Op::Rope(op) => {
                let (width, pairs) = (x[0].cols / op.heads as usize, x[1].cols);
                let mut y = x[0].clone();
                y.rows_mut(|r, row| {
                    for head in row.chunks_mut(width) {
                        for j in 0..pairs {
                            let (c, s) = (x[1].data[r * pairs + j], x[2].data[r * pairs + j]);
                            let (a, b) = (head[j], head[j + pairs]);
                            (head[j], head[j + pairs]) = (a * c - b * s, a * s + b * c);
                        }
                    }
                });
                y
            }
            Op::Sdpa(op) => sdpa(op, x[0], x[1], x[2]),
            Op::Silu(_) => x[0].map(silu),
            Op::Gelu(op) => {
                assert_eq!(op.form, GeluForm::Tanh, "the tests use the tanh form");
                x[0].map(|v| 0.5 * v * (1.0 + (0.797_884_56 * (v + 0.044_715 * v.powi(3))).tanh()))
            }
            Op::Relu(_) => x[0].map(|v| v.max(0.0)),
            Op::Scale(op) => x[0].map(|v| v * op.by),
            Op::Add(_) => x[0].zip(x[1], |a, b| a + b),
            Op::Mul(_) => x[0].zip(x[1], |a, b| a * b),
            Op::Split(op) => {
                let mut start = 0;
                let mut part = |size: &u64| {
                    let size = *size as usize;
                    let data = x[0].data.chunks(x[0].cols).flat_map(|r| r[start..start + size].to_vec()).collect();
                    start += size;
                    Matrix { cols: size, data }
                };
                return op.sizes.iter().map(&mut part).collect();
            }
            Op::Concat(_) => {
                let row = |r: usize| x.iter().flat_map(move |m| m.data[r * m.cols..(r + 1) * m.cols].to_vec());
                Matrix { cols: x.iter().map(|m| m.cols).sum(), data: (0..x[0].rows()).flat_map(row).collect() }
            }
            other => panic!("the tests do not use {other:?}"),
        }]
    }

    /// The region's results.
    pub fn results(&self) -> Vec<Matrix> {
        let values = self.values();
        self.region.results().iter().map(|r| values[r].clone()).collect()
    }

    /// The value of this name.
    pub fn named(&self, name: &str) -> ValueId {
        self.region.value_ids().find(|v| &*self.region.value(*v).name == name).unwrap()
    }
}

fn sdpa(op: &Sdpa, q: &Matrix, k: &Matrix, v: &Matrix) -> Matrix {
    let (heads, kv) = (op.heads as usize, op.kv_heads as usize);
    let (d, e, times) = (q.cols / heads, v.cols / kv, heads / kv);
    let mut out = Matrix { cols: heads * e, data: vec![0.0; q.rows() * heads * e] };
    for i in 0..q.rows() {
        for h in 0..heads {
            let at = |m: &Matrix, r: usize, head: usize, w: usize| m.data[r * m.cols + head * w..][..w].to_vec();
            let seen = if op.causal { i + 1 } else { q.rows() };
            let score = |j: usize| {
                let (a, b) = (at(q, i, h, d), at(k, j, h / times, d));
                a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>() * op.scale.unwrap_or(1.0 / (d as f64).sqrt())
            };
            let scores: Vec<f64> = (0..seen).map(score).collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            for (j, s) in scores.iter().enumerate() {
                for (c, v) in at(v, j, h / times, e).iter().enumerate() {
                    out.data[i * heads * e + h * e + c] += (s - top).exp() / sum * v;
                }
            }
        }
    }
    out
}

/// Whether an operand is this weight.
pub fn is(operand: Operand, weight: WeightId) -> bool {
    operand == Operand::Weight(weight)
}
