//! ONNX ops on values that depend on the tokens: what only moves axes changes the view, all else makes a node.

use awqc_ir::Operand;
use awqc_ir::op::Embedding;
use serde_json::{Map, Value as Json, json};

use super::channels::thin;
use super::evaluate::{int, ints, parts, reshape, shape, slices, squeezed, unsqueezed};
use super::facts;
use super::import::{Form, Importer, Known, Thing, Val};
use super::numbers::{Numbers, axis};
use super::proto::{Attribute, Node};
use super::view::{KEYS, View, channels};
use crate::error::ImportError;

/// Functions of each number by itself.
const POINTWISE: [&str; 16] = [
    "Neg",
    "Sqrt",
    "Reciprocal",
    "Exp",
    "Log",
    "Abs",
    "Tanh",
    "Erf",
    "Sigmoid",
    "Relu",
    "Cos",
    "Sin",
    "Gelu",
    "Softplus",
    "HardSigmoid",
    "HardSwish",
];

/// Functions of two numbers.
const BINARY: [&str; 5] = ["Add", "Sub", "Mul", "Div", "Pow"];

pub(super) type Made = Result<Vec<Thing>, ImportError>;

pub(super) fn one(val: Val) -> Made {
    Ok(vec![Thing::Value(val)])
}

/// A number as people write it: that of a 4-byte float with the fewest digits.
pub(super) fn plain(v: f64) -> Json {
    let short = format!("{}", v as f32).parse::<f64>();
    json!(short.ok().filter(|s| (*s as f32) == (v as f32)).unwrap_or(v))
}

/// The number that both sides are, if they are one and the same.
pub(super) fn scalar(known: &Known) -> Option<f64> {
    known[0].only().filter(|v| known[1].only() == Some(*v))
}

impl Importer<'_> {
    /// An op with an operand that depends on the tokens.
    pub(super) fn value(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
        let known = |i: usize| match inputs.get(i) {
            Some(Some(Thing::Known(k))) => Some(k.clone()),
            Some(_) | None => None,
        };
        let x = match inputs.first() {
            Some(Some(Thing::Value(x))) => x.clone(),
            // Only `Gather`, `Where` and ops of two operands have the value elsewhere.
            Some(_) | None => return self.value_later(node, inputs),
        };
        if POINTWISE.contains(&node.op.as_str()) {
            return self.pointwise(node, &x);
        }
        if BINARY.contains(&node.op.as_str()) {
            return self.binary(node, inputs);
        }
        let shapes = [x.view.shape(0), x.view.shape(1)];
        let rank = x.view.0.len();
        let seen = |view: Option<View>, this: &Self| match view {
            Some(view) => one(Val { view, ..x.clone() }),
            None => this.refuse(node, format!("axes of {:?} (batch 2, 24 positions) are mixed", shapes[0])),
        };
        let fail = |this: &Self, e: String| this.refuse(node, e);
        match node.op.as_str() {
            "Identity" | "Cast" | "Dropout" => one(x),
            "Shape" => Ok(vec![Thing::Known(shapes.map(|s| shape(node, &s)))]),
            "Reshape" => {
                let Some(target) = known(1) else { return self.refuse(node, "the shape depends on the tokens") };
                let to = |i: usize| reshape(node, &shapes[i], &target[i].ints());
                match (to(0), to(1)) {
                    (Ok(a), Ok(b)) => seen(x.view.reshaped([&a, &b]), self),
                    (Err(e), _) | (_, Err(e)) => fail(self, e),
                }
            }
            "Flatten" => {
                let Ok(at) = axis(int(node, "axis").unwrap_or(1), rank + 1) else {
                    return self.refuse(node, "no such axis");
                };
                let to = shapes.clone().map(|s| vec![s[..at].iter().product::<usize>(), s[at..].iter().product()]);
                seen(x.view.reshaped([&to[0], &to[1]]), self)
            }
            "Transpose" => {
                let perm = ints(node, "perm", None).unwrap_or_else(|| (0..rank as i64).rev().collect());
                match perm.iter().map(|p| axis(*p, rank)).collect::<Result<Vec<_>, _>>() {
                    Ok(perm) => seen(x.view.transposed(&perm), self),
                    Err(e) => fail(self, e),
                }
            }
            "Unsqueeze" => {
                let axes = ints(node, "axes", known(1).as_ref().map(|k| &k[0])).unwrap_or_default();
                match unsqueezed(&shapes[0], &axes) {
                    Ok(at) => {
                        let View(mut axes) = x.view.clone();
                        at.into_iter().for_each(|a| axes.insert(a.min(axes.len()), Vec::new()));
                        seen(Some(View(axes)), self)
                    }
                    Err(e) => fail(self, e),
                }
            }
            "Squeeze" => match squeezed(&shapes[0], ints(node, "axes", known(1).as_ref().map(|k| &k[0]))) {
                Ok(gone) => {
                    let kept = x.view.0.iter().enumerate().filter(|(i, _)| !gone.contains(i)).map(|(_, a)| a.clone());
                    seen(Some(View(kept.collect())), self)
                }
                Err(e) => fail(self, e),
            },
            "Expand" => {
                let Some(target) = known(1) else { return self.refuse(node, "the shape depends on the tokens") };
                let to = target.each_ref().map(|t| t.ints().iter().map(|d| (*d).max(0) as usize).collect::<Vec<_>>());
                seen(x.view.expanded([&to[0], &to[1]]), self)
            }
            "Slice" => {
                let rest: Vec<Option<Known>> = (1..inputs.len()).map(known).collect();
                let both = [0, 1].map(|i| {
                    let side: Vec<Option<&Numbers>> = rest.iter().map(|k| k.as_ref().map(|k| &k[i])).collect();
                    slices(rank, &side)
                });
                match both {
                    [Ok(a), Ok(b)] => {
                        let mut x = x;
                        for ((at, start, end, step), (_, start1, end1, _)) in a.into_iter().zip(b) {
                            x = self.slice(node, &x, at, [(start, end), (start1, end1)], step)?;
                        }
                        one(x)
                    }
                    [Err(e), _] | [_, Err(e)] => fail(self, e),
                }
            }
            "Split" => {
                let Ok(at) = axis(int(node, "axis").unwrap_or(0), rank) else {
                    return self.refuse(node, "no such axis");
                };
                let sizes = match parts(node, shapes[0][at], known(1).as_ref().map(|k| &k[0])) {
                    Ok(sizes) => sizes,
                    Err(e) => return fail(self, e),
                };
                let mut start = 0i64;
                let mut out = Vec::new();
                for size in sizes {
                    let end = start + size as i64;
                    out.push(Thing::Value(self.slice(node, &x, at, [(start, end); 2], 1)?));
                    start = end;
                }
                Ok(out)
            }
            "Gather" => {
                let at = axis(int(node, "axis").unwrap_or(0), rank);
                let (Ok(at), Some(i)) = (at, known(1).as_ref().and_then(scalar)) else {
                    return self.refuse(node, "only one entry of an axis, the same for all tokens, can be taken");
                };
                let i = if i < 0.0 { i + shapes[0][at] as f64 } else { i } as i64;
                let mut x = self.slice(node, &x, at, [(i, i + 1); 2], 1)?;
                if known(1).is_some_and(|k| k[0].shape.is_empty()) {
                    x.view.0.remove(at);
                }
                one(x)
            }
            "Concat" => self.concat(node, inputs),
            "ReduceMean" => {
                let axes = ints(node, "axes", known(1).as_ref().map(|k| &k[0])).unwrap_or_default();
                let last = axes.len() == 1 && axis(axes[0], rank).is_ok_and(|a| a + 1 == rank);
                match x.view.run(rank.saturating_sub(1)) {
                    Some((n, 1)) if last && x.form == Form::Rows => {
                        let heads = x.channels / n;
                        let attributes = Map::from_iter([("heads".to_owned(), json!(heads))]);
                        let ty = self.ty(Form::Rows, heads);
                        let id = self.foreign(node, &node.op, vec![Operand::Value(x.id)], attributes, ty)?;
                        let View(mut axes) = thin(&x.view, n);
                        match axes.last_mut() {
                            Some(last) if int(node, "keepdims").unwrap_or(1) != 0 => last.clear(),
                            Some(_) | None => drop(axes.pop()),
                        }
                        one(Val { id, channels: heads, view: View(axes), ..x })
                    }
                    _other => self.refuse(node, "only the mean over the channels, or those of each head, is known"),
                }
            }
            "Softmax" => {
                let last = axis(int(node, "axis").unwrap_or(-1), rank).is_ok_and(|a| a + 1 == rank);
                if last && x.form == Form::Scores && x.view.0.last() == Some(&vec![KEYS]) {
                    return self.pointwise(node, &x);
                }
                self.refuse(node, "only the shares of attention scores over the keys are known")
            }
            "MatMul" | "Gemm" => self.product(node, &x, inputs),
            "Where" => self.value_later(node, inputs),
            _other => self.other(node, &x, inputs),
        }
    }

    /// Ops whose first operand does not depend on the tokens.
    fn value_later(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
        match (node.op.as_str(), inputs) {
            ("Gather", [Some(Thing::Weight(table)), Some(Thing::Value(ids))])
                if ids.form == Form::Ids && table.shape.len() == 2 && int(node, "axis").unwrap_or(0) == 0 =>
            {
                let (width, weight) = (table.shape[1], self.matrix(node, table));
                let id =
                    self.emit(node, Embedding { offset: 0 }, vec![Operand::Value(ids.id), Operand::Weight(weight)])?;
                let View(mut axes) = ids.view.clone();
                axes.push(vec![channels(width, 1)]);
                one(Val { id, form: Form::Rows, channels: width, view: View(axes) })
            }
            ("Where", [Some(Thing::Known(seen)), Some(Thing::Value(x)), Some(Thing::Known(low))])
                if x.form == Form::Scores && scalar(low).is_some_and(|v| v <= -1e4) =>
            {
                self.mask(node, x, facts::mask(seen, |v| Some(v != 0.0)))
            }
            ("Where", [Some(Thing::Known(unseen)), Some(Thing::Known(low)), Some(Thing::Value(x))])
                if x.form == Form::Scores && scalar(low).is_some_and(|v| v <= -1e4) =>
            {
                self.mask(node, x, facts::mask(unseen, |v| Some(v == 0.0)))
            }
            (op, _) if BINARY.contains(&op) => self.binary(node, inputs),
            _other => self.refuse(node, "this use of what depends on the tokens is not known"),
        }
    }

    fn pointwise(&mut self, node: &Node, x: &Val) -> Made {
        let mut attributes = Map::new();
        for (name, value) in &node.attributes {
            match value {
                Attribute::Text(t) => drop(attributes.insert(name.clone(), t.as_str().into())),
                Attribute::Float(v) => drop(attributes.insert(name.clone(), plain(f64::from(*v)))),
                Attribute::Int(_)
                | Attribute::Ints(_)
                | Attribute::Floats(_)
                | Attribute::Tensor(_)
                | Attribute::Other => {}
            }
        }
        let id = self.foreign(node, &node.op, vec![Operand::Value(x.id)], attributes, self.ty(x.form, x.channels))?;
        one(Val { id, ..x.clone() })
    }

    /// An op that is not known here: rewrites may know it. Its operands must lie as they are.
    fn other(&mut self, node: &Node, x: &Val, inputs: &[Option<Thing>]) -> Made {
        let mut operands = Vec::new();
        for thing in inputs.iter().flatten() {
            match thing {
                Thing::Value(v) if in_order(v) && v.view == x.view => operands.push(Operand::Value(v.id)),
                Thing::Weight(term) => operands.push(Operand::Weight(self.matrix(node, term))),
                Thing::Value(_) | Thing::Known(_) => return self.refuse(node, "this op is not known"),
            }
        }
        let mut attributes = Map::new();
        for (name, value) in &node.attributes {
            let json = match value {
                Attribute::Int(n) => json!(n),
                Attribute::Float(v) => plain(f64::from(*v)),
                Attribute::Text(t) => json!(t),
                Attribute::Ints(list) => json!(list),
                Attribute::Floats(list) => json!(list),
                Attribute::Tensor(_) | Attribute::Other => {
                    return self.refuse(node, format!("its attribute `{name}` is not known"));
                }
            };
            attributes.insert(name.clone(), json);
        }
        let id = self.foreign(node, &node.op, operands, attributes, self.ty(x.form, x.channels))?;
        one(Val { id, ..x.clone() })
    }
}

/// Whether the last axis is all channels of a token.
fn in_order(v: &Val) -> bool {
    v.form == Form::Rows && v.view.run(v.view.0.len().saturating_sub(1)) == Some((v.channels, 1))
}
