//! ONNX ops on values that depend on the tokens: what only moves axes changes the view, all else makes a node.

use awqc_ir::op::{Concat, Embedding, Linear};
use awqc_ir::{Operand, Type};
use serde_json::{Map, Value as Json, json};

use super::evaluate::{int, ints, parts, reshape, shape, slices, squeezed, unsqueezed};
use super::facts::{self, Mask};
use super::import::{Form, Importer, Known, Term, Thing, Val};
use super::numbers::{Numbers, axis, picked};
use super::proto::{Attribute, Node};
use super::view::{Factor, Fit, From, KEYS, SEQ, View, channels};
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

type Made = Result<Vec<Thing>, ImportError>;

fn one(val: Val) -> Made {
    Ok(vec![Thing::Value(val)])
}

/// A number as people write it: that of a 4-byte float with the fewest digits.
fn plain(v: f64) -> Json {
    let short = format!("{}", v as f32).parse::<f64>();
    json!(short.ok().filter(|s| (*s as f32) == (v as f32)).unwrap_or(v))
}

/// The number that both sides are, if they are one and the same.
fn scalar(known: &Known) -> Option<f64> {
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

    fn mask(&mut self, node: &Node, x: &Val, mask: Option<Mask>) -> Made {
        let attributes = match mask {
            Some(Mask::All) => return one(x.clone()),
            Some(Mask::Causal) => json!({"causal": true}),
            Some(Mask::Window(n)) => json!({"causal": true, "window": n}),
            None => {
                return self.refuse(
                    node,
                    "what is added to the attention scores is neither a causal mask nor a sliding window",
                );
            }
        };
        let Json::Object(attributes) = attributes else { return one(x.clone()) };
        let id = self.foreign(node, "Mask", vec![Operand::Value(x.id)], attributes, self.ty(x.form, x.channels))?;
        one(Val { id, ..x.clone() })
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

    fn binary(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
        let [Some(a), Some(b)] = inputs else { return self.refuse(node, "two operands are needed") };
        let (x, other, turned) = match (a, b) {
            (Thing::Value(x), Thing::Value(y)) if y.view.0.len() > x.view.0.len() => (y, a, true),
            (Thing::Value(x), other) => (x, other, false),
            (other, Thing::Value(x)) => (x, other, true),
            (Thing::Known(_) | Thing::Weight(_), Thing::Known(_) | Thing::Weight(_)) => {
                return self.refuse(node, "no operand depends on the tokens");
            }
        };
        let commutes = matches!(node.op.as_str(), "Add" | "Mul");
        let constant = match other {
            Thing::Known(known) => scalar(known),
            Thing::Weight(term) if term.shape.iter().all(|d| *d == 1) => scalar(&self.read(term)?),
            Thing::Weight(_) | Thing::Value(_) => None,
        };
        if let Some(c) = constant {
            // `x / 3` and `3 / x` differ in where the number is.
            let key = if turned && !commutes { "of" } else { "by" };
            let attributes = Map::from_iter([(key.to_owned(), plain(c))]);
            let id =
                self.foreign(node, &node.op, vec![Operand::Value(x.id)], attributes, self.ty(x.form, x.channels))?;
            return one(Val { id, ..x.clone() });
        }
        match other {
            Thing::Known(known) if x.form == Form::Scores && node.op == "Add" => {
                self.mask(node, x, facts::mask(known, facts::added))
            }
            Thing::Known(known) => match self.table(node, known)? {
                Some(table) if !turned || commutes => self.pair(node, x, &table),
                Some(_) | None => {
                    self.refuse(node, "numbers that are neither a mask nor cosines and sines of positions")
                }
            },
            Thing::Weight(term) => {
                let last = x.view.0.len().saturating_sub(1);
                let len: usize = term.shape.iter().product();
                let fits =
                    term.shape.last() == Some(&len) && x.view.run(last) == Some((len, 1)) && x.form == Form::Rows;
                if !fits || (turned && !commutes) {
                    return self
                        .refuse(node, format!("a weight of shape {:?} does not go with the channels", term.shape));
                }
                let weight = self.matrix(node, term);
                let operands = vec![Operand::Value(x.id), Operand::Weight(weight)];
                let heads = Map::from_iter([("heads".to_owned(), json!(x.channels / len))]);
                let id = self.foreign(node, &node.op, operands, heads, self.ty(x.form, x.channels))?;
                one(Val { id, ..x.clone() })
            }
            Thing::Value(y) if y.channels > x.channels && commutes => self.pair(node, y, x),
            Thing::Value(y) if turned && !commutes => self.pair_refused(node, x, y),
            // The right side is not larger, so that the order of a sum is kept.
            Thing::Value(y) => self.pair(node, x, y),
        }
    }

    fn pair_refused(&self, node: &Node, x: &Val, y: &Val) -> Made {
        let shapes = (x.view.shape(0), y.view.shape(0));
        self.refuse(
            node,
            format!("shapes {:?} and {:?} (batch 2, 24 positions) are not known to go together", shapes.0, shapes.1),
        )
    }

    /// An op of two values.
    fn pair(&mut self, node: &Node, x: &Val, y: &Val) -> Made {
        let scores = (x.form == Form::Scores) == (y.form == Form::Scores);
        let Some(fit) = x.view.fits(x.channels, &y.view, y.channels).filter(|_| scores && y.form != Form::Ids) else {
            return self.pair_refused(node, x, y);
        };
        let mut attributes = Map::new();
        if fit == Fit::Each {
            attributes.insert("heads".into(), json!(x.channels / y.channels));
        }
        let operands = vec![Operand::Value(x.id), Operand::Value(y.id)];
        let id = self.foreign(node, &node.op, operands, attributes, self.ty(x.form, x.channels))?;
        one(Val { id, ..x.clone() })
    }

    /// Cosines or sines as a value; the table is made when it is needed first.
    fn table(&mut self, node: &Node, known: &Known) -> Result<Option<Val>, ImportError> {
        let Some(this) = facts::trig(known) else { return Ok(None) };
        let others = self.things.values().filter_map(|t| match t {
            Thing::Known(k) if k[0].data.len() == known[0].data.len() => facts::trig(k),
            Thing::Known(_) | Thing::Weight(_) | Thing::Value(_) => None,
        });
        let Some((angles, cosines)) = others.into_iter().find_map(|o| facts::angles(&this, &o)) else {
            return Ok(None);
        };
        let pairs = angles.turns.len();
        let found = self.tables.iter().find(|(a, _)| *a == angles).map(|(_, ids)| *ids);
        let [cos, sin] = match found {
            Some(ids) => ids,
            None => {
                let at = Operand::Value(self.positions);
                let (cos, sin) = self.emit_all(node, angles.table().into(), vec![at], &["cos", "sin"])?;
                let mut ids = [cos, sin];
                if angles.halves {
                    for id in &mut ids {
                        let twice = vec![Operand::Value(*id); 2];
                        *id = self.emit(node, Concat { heads: 1 }, twice)?;
                    }
                }
                self.tables.push((angles.clone(), ids));
                ids
            }
        };
        let columns = if angles.halves { 2 * pairs } else { pairs };
        let mut axes = vec![Vec::new(); known[0].shape.len().saturating_sub(2)];
        axes.extend([vec![SEQ], vec![channels(columns, 1)]]);
        let id = if cosines { cos } else { sin };
        Ok(Some(Val { id, form: Form::Table, channels: columns, view: View(axes) }))
    }

    /// Entries of an axis.
    fn slice(&mut self, node: &Node, x: &Val, at: usize, ends: [(i64, i64); 2], step: i64) -> Result<Val, ImportError> {
        let len = [0, 1].map(|i| x.view.shape(i).get(at).copied().unwrap_or(0) as i64);
        let picks = [0, 1].map(|i| picked(len[i], ends[i].0, ends[i].1, step));
        let [Ok(a), Ok(b)] = picks else { return self.refuse(node, "a slice that picks nothing known") };
        let all = |p: &[i64], len: i64| p.iter().copied().eq(0..len);
        if all(&a, len[0]) && all(&b, len[1]) {
            return Ok(x.clone());
        }
        let (Some((n, stride)), Some(start), true) =
            (x.view.run(at), a.first().copied(), a == b && step == 1 && x.form == Form::Rows)
        else {
            return self.refuse(node, format!("a slice of axis {at} of {:?} (batch 2, 24 positions)", x.view.shape(0)));
        };
        let (run, size, start) = (n * stride, a.len() * stride, start as usize * stride);
        let heads = x.channels / run;
        let channels = heads * size;
        let attributes = json!({"heads": heads, "start": start, "size": size});
        let Json::Object(attributes) = attributes else { return self.refuse(node, "no attributes") };
        let ty: Type = self.ty(Form::Rows, channels);
        let id = self.foreign(node, "Slice", vec![Operand::Value(x.id)], attributes, ty)?;
        // Channels further out than the cut run come closer together.
        let mut view = x.view.clone();
        for f in view.0.iter_mut().flatten() {
            if let From::Channel(s) = &mut f.from
                && *s >= run
            {
                *s = *s / run * size;
            }
        }
        if let Some(axis) = view.0.get_mut(at) {
            *axis = if a.len() == 1 { Vec::new() } else { vec![self::channels(a.len(), stride)] };
        }
        Ok(Val { id, channels, view, ..x.clone() })
    }

    /// Channels, or those of each head, joined.
    fn concat(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
        let values = inputs.iter().map(|t| match t {
            Some(Thing::Value(v)) if v.form == Form::Rows => Some(v.clone()),
            Some(_) | None => None,
        });
        let Some(values) = values.collect::<Option<Vec<Val>>>() else {
            return self.refuse(node, "not all of the parts depend on the tokens");
        };
        let Some(first) = values.first().cloned() else { return self.refuse(node, "nothing is joined") };
        let rank = first.view.0.len();
        let last = axis(int(node, "axis").unwrap_or(-1), rank).is_ok_and(|a| a + 1 == rank);
        let runs: Option<Vec<usize>> = values
            .iter()
            .map(|v| v.view.run(v.view.0.len().saturating_sub(1)).filter(|r| r.1 == 1).map(|r| r.0))
            .collect();
        let Some(runs) = runs.filter(|_| last) else { return self.refuse(node, "only channels can be joined") };
        let heads = first.channels / runs[0];
        let alike = |(v, n): (&Val, &usize)| {
            v.channels / n == heads
                && thin(&v.view, *n).0.split_last().map(|s| s.1.to_vec())
                    == thin(&first.view, runs[0]).0.split_last().map(|s| s.1.to_vec())
        };
        if !values.iter().zip(&runs).all(alike) {
            return self.refuse(node, "the parts differ in more than their channels");
        }
        let total: usize = runs.iter().sum();
        let operands = values.iter().map(|v| Operand::Value(v.id)).collect();
        let id = self.emit(node, Concat { heads: heads as u64 }, operands)?;
        let View(mut axes) = thin(&first.view, runs[0]);
        for f in axes.iter_mut().flatten() {
            if let From::Channel(s) = &mut f.from {
                *s *= total;
            }
        }
        if let Some(last) = axes.last_mut() {
            *last = vec![channels(total, 1)];
        }
        one(Val { id, channels: heads * total, view: View(axes), ..first })
    }

    /// A product with a weight, or the two of attention.
    fn product(&mut self, node: &Node, x: &Val, inputs: &[Option<Thing>]) -> Made {
        let last = x.view.0.len().saturating_sub(1);
        match inputs.get(1) {
            Some(Some(Thing::Weight(term))) if term.shape.len() == 2 && x.form == Form::Rows => {
                let mut term: Term = term.clone();
                if int(node, "transB").unwrap_or(0) != 0 {
                    term.shape.reverse();
                    term.transposed = !term.transposed;
                }
                let unit = |name| !matches!(node.attributes.get(name), Some(Attribute::Float(v)) if *v != 1.0);
                if !unit("alpha") || !unit("beta") || int(node, "transA").unwrap_or(0) != 0 {
                    return self.refuse(node, "a product with factors or of a transposed value");
                }
                let (inner, outer) = (term.shape[0], term.shape[1]);
                if x.view.run(last) != Some((inner, 1)) || x.channels != inner {
                    return self
                        .refuse(node, format!("the channels do not go with a weight of shape {:?}", term.shape));
                }
                let mut operands = vec![Operand::Value(x.id), Operand::Weight(self.linear(node, &term))];
                match inputs.get(2) {
                    Some(Some(Thing::Weight(bias))) => operands.push(Operand::Weight(self.matrix(node, bias))),
                    Some(None) | None => {}
                    Some(Some(Thing::Known(_) | Thing::Value(_))) => return self.refuse(node, "the bias is no weight"),
                }
                let id = self.emit(node, Linear {}, operands)?;
                let View(mut axes) = x.view.clone();
                if let Some(last) = axes.last_mut() {
                    *last = vec![channels(outer, 1)];
                }
                one(Val { id, channels: outer, view: View(axes), ..x.clone() })
            }
            Some(Some(Thing::Value(y))) => match attention(x, y) {
                Some((made, attributes)) => {
                    let ty = self.ty(made.form, made.channels);
                    let operands = vec![Operand::Value(x.id), Operand::Value(y.id)];
                    let id = self.foreign(node, "MatMul", operands, attributes, ty)?;
                    one(Val { id, ..made })
                }
                None => self.pair_refused(node, x, y),
            },
            Some(_) | None => self.refuse(node, "the other factor is no matrix of weights"),
        }
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

/// The view of one channel for each run of `n`.
fn thin(view: &View, n: usize) -> View {
    let mut out = view.clone();
    for f in out.0.iter_mut().flatten() {
        if let From::Channel(s) = &mut f.from
            && *s >= n
        {
            *s /= n;
        }
    }
    out
}

/// The products of attention: `q kᵀ`, head by head, and that of its shares with `v`. Key/value heads may be repeated,
/// each for as many query heads as share it.
fn attention(x: &Val, y: &Val) -> Option<(Val, Map<String, Json>)> {
    let split = |v: &View| {
        Some((
            v.0.iter().rev().skip(2).rev().flatten().copied().collect::<Vec<Factor>>(),
            v.0.last_chunk::<2>()?.clone(),
        ))
    };
    let ((lead_x, [x1, x2]), (lead_y, [y1, y2])) = (split(&x.view)?, split(&y.view)?);
    let width = |c: &[Factor]| match c {
        [Factor { size, from: From::Channel(1) }] => Some(size[0]),
        _ => None,
    };
    let seq = |a: &[Factor]| a == [SEQ];
    // Heads `d` channels apart, behind the batch; and how often each is repeated.
    let heads = |lead: &[Factor], total: usize, d: usize| {
        let (batch, rest) = lead.split_first()?;
        let count = total.checked_div(d)?;
        let whole = (count > 1).then(|| channels(count, d));
        let rest = match (whole, rest) {
            (Some(w), [first, rest @ ..]) if *first == w => rest,
            (None, rest) => rest,
            _other => return None,
        };
        match rest {
            _ if batch.from != From::Batch => None,
            [] => Some((count, 1)),
            [Factor { size, from: From::Repeat }] => Some((count, size[0])),
            _other => None,
        }
    };
    match (x.form, y.form) {
        (Form::Rows, Form::Rows) if seq(&x1) && seq(&y2) => {
            let d = width(&x2).filter(|d| width(&y1) == Some(*d))?;
            let ((h, 1), (k, repeated)) = (heads(&lead_x, x.channels, d)?, heads(&lead_y, y.channels, d)?) else {
                return None;
            };
            (h == k * repeated).then_some(())?;
            let View(mut axes) = thin(&x.view, d);
            let rank = axes.len();
            axes[rank - 1] = vec![KEYS];
            let attributes = json!({"scores": true, "heads": h, "kv_heads": k});
            let Json::Object(attributes) = attributes else { return None };
            Some((Val { id: x.id, form: Form::Scores, channels: h, view: View(axes) }, attributes))
        }
        (Form::Scores, Form::Rows) if seq(&x1) && x2 == [KEYS] && seq(&y1) => {
            let d = width(&y2)?;
            let ((h, 1), (k, repeated)) = (heads(&lead_x, x.channels, 1)?, heads(&lead_y, y.channels, d)?) else {
                return None;
            };
            (h == k * repeated).then_some(())?;
            let View(mut axes) = x.view.clone();
            for f in axes.iter_mut().flatten() {
                if let From::Channel(s) = &mut f.from {
                    *s *= d;
                }
            }
            let rank = axes.len();
            axes[rank - 1] = vec![channels(d, 1)];
            let attributes = json!({"heads": h, "kv_heads": k});
            let Json::Object(attributes) = attributes else { return None };
            Some((Val { id: x.id, form: Form::Rows, channels: h * d, view: View(axes) }, attributes))
        }
        _other => None,
    }
}
