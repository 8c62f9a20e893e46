//! Matrix products: with a weight, and the two of attention.

use awqc_ir::Operand;
use awqc_ir::op::Linear;
use serde_json::{Map, Value as Json, json};

use super::channels::thin;
use super::evaluate::int;
use super::import::{Form, Importer, Term, Thing, Val};
use super::proto::{Attribute, Node};
use super::values::{Made, one};
use super::view::{Factor, From, KEYS, SEQ, View, channels};

impl Importer<'_> {
    /// A product with a weight, or the two of attention.
    pub(super) fn product(&mut self, node: &Node, x: &Val, inputs: &[Option<Thing>]) -> Made {
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
