//! ONNX ops of two operands: with a number, a weight, a mask, cosines and sines, or another value.

use awqc_ir::Operand;
use awqc_ir::op::Concat;
use serde_json::{Map, Value as Json, json};

use super::facts::{self, Mask};
use super::import::{Form, Importer, Known, Thing, Val};
use super::proto::Node;
use super::values::{Made, one, plain, scalar};
use super::view::{Fit, SEQ, View, channels};
use crate::error::ImportError;

impl Importer<'_> {
    pub(super) fn binary(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
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

    pub(super) fn pair_refused(&self, node: &Node, x: &Val, y: &Val) -> Made {
        let shapes = (x.view.shape(0), y.view.shape(0));
        self.refuse(
            node,
            format!("shapes {:?} and {:?} (batch 2, 24 positions) are not known to go together", shapes.0, shapes.1),
        )
    }

    /// An op of two values.
    pub(super) fn pair(&mut self, node: &Node, x: &Val, y: &Val) -> Made {
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

    pub(super) fn mask(&mut self, node: &Node, x: &Val, mask: Option<Mask>) -> Made {
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

    /// Cosines or sines as a value; the table is made when it is needed first.
    pub(super) fn table(&mut self, node: &Node, known: &Known) -> Result<Option<Val>, ImportError> {
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
}
