//! From an ONNX graph to a region of one piece. Each ONNX value is one of three things: numbers that do not depend on
//! the tokens, which are computed ([`super::evaluate`]); a weight; or a value of the region and how it lies there
//! ([`super::view`]). Only ops on the last kind make nodes.

use std::collections::BTreeMap;
use std::path::Path;

use awqc_ir::op::Embedding;
use awqc_ir::{Dim, Elem, Op, Operand, Region, RegionName, Type, ValueId, WeightId};
use serde_json::{Map, Value as Json};

use super::evaluate::{apply, int, ints};
use super::facts;
use super::numbers::Numbers;
use super::proto::{Attribute, Graph, Kind, Node, Tensor};
use super::source::Files;
use super::view::{SAMPLES, SEQ, View, channels};
use crate::error::ImportError;

/// Numbers for each of [`SAMPLES`].
pub(super) type Known = [Numbers; 2];

/// What an ONNX value is.
#[derive(Clone, Debug)]
pub(super) enum Thing {
    Known(Known),
    Weight(Term),
    Value(Val),
}

/// A float tensor of the file.
#[derive(Clone, Debug)]
pub(super) struct Term {
    pub(super) tensor: String,
    /// Its shape here.
    pub(super) shape: Vec<usize>,
    pub(super) transposed: bool,
    /// Added to each number.
    pub(super) plus: f64,
}

/// What the axes of a value of the region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Token ids, `i32[B,S]`.
    Ids,
    /// `[B,S,C]`.
    Rows,
    /// `[S,C]`: the same for every sequence.
    Table,
    /// `[B,heads,S,S]`: attention scores; the channels are the heads.
    Scores,
}

/// A value of the region.
#[derive(Clone, Debug)]
pub(super) struct Val {
    pub(super) id: ValueId,
    pub(super) form: Form,
    pub(super) channels: usize,
    pub(super) view: View,
}

/// See the module documentation.
pub(super) struct Importer<'g> {
    pub(super) path: &'g Path,
    pub(super) graph: &'g Graph,
    pub(super) files: &'g Files,
    pub(super) elem: Elem,
    pub(super) region: Region,
    pub(super) positions: ValueId,
    pub(super) things: BTreeMap<String, Thing>,
    /// The tensors that the region uses, under their names there.
    pub(super) named: BTreeMap<String, (String, bool)>,
    pub(super) weights: BTreeMap<(String, bool, u64), WeightId>,
    /// Elements that were computed.
    spent: usize,
    /// A distance between positions that is longer than the samples, so that they do not show what it is for.
    pub(super) far: Option<f64>,
    /// A distance, and a short one in its place.
    pub(super) instead: Option<(f64, f64)>,
    /// Tables of angles that are there already.
    pub(super) tables: Vec<(facts::Angles, [ValueId; 2])>,
}

impl<'g> Importer<'g> {
    pub(super) fn new(path: &'g Path, graph: &'g Graph, files: &'g Files) -> Result<Self, ImportError> {
        let mut region = Region::new(RegionName::Named("model".into()), "");
        let sym = |s: &str| Dim::Sym(s.into());
        let ids = region.add_param("ids", Type::new(Elem::I32, [sym("B"), sym("S")]));
        let positions = region.add_param("pos", Type::new(Elem::I32, [sym("S")]));
        let elem = most(graph);
        let (things, named, weights, tables) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut out = Self {
            path,
            graph,
            files,
            elem,
            region,
            positions,
            things,
            named,
            weights,
            spent: 0,
            far: None,
            instead: None,
            tables,
        };
        out.inputs(ids)?;
        Ok(out)
    }

    /// The model's inputs, by the names that transformers gives them.
    fn inputs(&mut self, ids: ValueId) -> Result<(), ImportError> {
        for name in &self.graph.inputs {
            let known = |f: &dyn Fn(usize) -> f64| {
                SAMPLES.map(|(b, s)| Numbers::new(vec![b, s], (0..b * s).map(|i| f(i % s)).collect(), true))
            };
            let thing = match name.as_str() {
                "input_ids" => {
                    let View(mut axes) = View::rows(1);
                    axes.pop();
                    Thing::Value(Val { id: ids, form: Form::Ids, channels: 1, view: View(axes) })
                }
                "attention_mask" => Thing::Known(known(&|_| 1.0)),
                "position_ids" => Thing::Known(known(&|i| i as f64)),
                other => {
                    return Err(ImportError::unsupported(
                        self.path,
                        format!(
                            "takes `{other}`; a model takes input_ids, and attention_mask and position_ids if need be: export it with use_cache=False"
                        ),
                    ));
                }
            };
            self.things.insert(name.clone(), thing);
        }
        match self.things.contains_key("input_ids") {
            true => Ok(()),
            false => Err(ImportError::unsupported(self.path, "has no input `input_ids`: it is no language model")),
        }
    }

    /// Reads all nodes; the region's result is the logits.
    pub(super) fn run(&mut self) -> Result<(), ImportError> {
        for node in &self.graph.nodes {
            self.node(node)?;
        }
        let name = self.graph.outputs.first().cloned().unwrap_or_default();
        let logits = match self.thing(&name)? {
            Thing::Value(v) if v.form == Form::Rows && v.view == View::rows(v.channels) => v.id,
            _other => {
                return Err(ImportError::unsupported(
                    self.path,
                    format!("its first output, `{name}`, is not logits [batch, sequence, vocabulary]"),
                ));
            }
        };
        self.region.set_results(vec![logits]);
        super::slices::to_splits(&mut self.region);
        Ok(())
    }

    pub(super) fn refuse<T>(&self, node: &Node, why: impl std::fmt::Display) -> Result<T, ImportError> {
        Err(ImportError::unsupported(self.path, format!("node `{}`, {}: {why}", place(node), node.op)))
    }

    pub(super) fn thing(&self, name: &str) -> Result<Thing, ImportError> {
        if let Some(thing) = self.things.get(name) {
            return Ok(thing.clone());
        }
        let bad = || ImportError::malformed(self.path, format!("`{name}` is used before it is computed"));
        let tensor = self.graph.tensors.get(name).ok_or_else(bad)?;
        if tensor.kind.is_float() && !tensor.shape.is_empty() {
            let (tensor, shape) = (name.to_owned(), tensor.shape.clone());
            return Ok(Thing::Weight(Term { tensor, shape, transposed: false, plus: 0.0 }));
        }
        let numbers = self.numbers(tensor).map_err(|e| self.unreadable(name, e))?;
        Ok(Thing::Known([numbers.clone(), numbers]))
    }

    fn unreadable(&self, name: &str, why: String) -> ImportError {
        ImportError::malformed(self.path, format!("tensor `{name}`: {why}"))
    }

    /// The numbers of a tensor.
    pub(super) fn numbers(&self, tensor: &Tensor) -> Result<Numbers, String> {
        super::numbers::count(&tensor.shape)?;
        let bytes = self.files.bytes(tensor)?;
        let f32s = |t: awqc_ir::RawTensor| t.to_f32().unwrap_or_default().into_iter().map(f64::from).collect();
        let data: Vec<f64> = match tensor.kind {
            Kind::Bool => bytes.iter().map(|b| f64::from(*b)).collect(),
            Kind::I32 => bytes.as_chunks::<4>().0.iter().map(|c| f64::from(i32::from_le_bytes(*c))).collect(),
            Kind::I64 => bytes.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c) as f64).collect(),
            Kind::F64 => bytes.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect(),
            Kind::F32 | Kind::F16 | Kind::Bf16 => f32s(awqc_ir::RawTensor { info: tensor.info(), bytes }),
        };
        Numbers::new(tensor.shape.clone(), data, !tensor.kind.is_float()).checked()
    }

    /// A weight's numbers.
    pub(super) fn read(&self, term: &Term) -> Result<Known, ImportError> {
        let fail = |e| self.unreadable(&term.tensor, e);
        let tensor = self.graph.tensors.get(&term.tensor).ok_or_else(|| fail("is not there".into()))?;
        let mut numbers = self.numbers(tensor).map_err(fail)?;
        if term.transposed {
            numbers = numbers.transposed(&[1, 0]).map_err(fail)?;
        }
        let numbers = numbers.map(|v| v + term.plus).reshaped(term.shape.clone()).map_err(fail)?;
        Ok([numbers.clone(), numbers])
    }

    fn node(&mut self, node: &Node) -> Result<(), ImportError> {
        let inputs = node.inputs.iter().map(|name| match name.as_str() {
            "" => Ok(None),
            name => self.thing(name).map(Some),
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let made = if inputs.iter().flatten().any(|t| matches!(t, Thing::Value(_))) {
            self.value(node, &inputs)?
        } else {
            self.known(node, &inputs)?
        };
        for (name, thing) in node.outputs.iter().zip(made) {
            self.things.insert(name.clone(), thing);
        }
        Ok(())
    }

    /// An op on what does not depend on the tokens.
    fn known(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Result<Vec<Thing>, ImportError> {
        if node.op == "Constant" {
            return Ok(vec![self.constant(node)?]);
        }
        if let [Some(Thing::Weight(term)), rest @ ..] = inputs
            && let Some(thing) = self.weight_op(node, term, rest)?
        {
            return Ok(vec![thing]);
        }
        if let ("Add", [Some(other), Some(Thing::Weight(term))]) = (node.op.as_str(), inputs)
            && let Some(thing) = self.weight_op(node, term, &[Some(other.clone())])?
        {
            return Ok(vec![thing]);
        }
        let mut sides: [Vec<Option<Numbers>>; 2] = [Vec::new(), Vec::new()];
        for thing in inputs {
            let known = match thing {
                Some(Thing::Known(known)) => Some(known.clone()),
                Some(Thing::Weight(term)) => Some(self.read(term)?),
                Some(Thing::Value(_)) | None => None,
            };
            for (i, side) in sides.iter_mut().enumerate() {
                side.push(known.as_ref().map(|k| k[i].clone()));
            }
        }
        self.distances(node, &mut sides);
        let mut made: Vec<Vec<Numbers>> = Vec::new();
        for side in &sides {
            let operands: Vec<Option<&Numbers>> = side.iter().map(Option::as_ref).collect();
            let done = match node.op.as_str() {
                "ConstantOfShape" => self.filled(node, operands.first().copied().flatten()).map(Some),
                _any => apply(node, &operands),
            };
            match done {
                Ok(Some(numbers)) => made.push(numbers),
                Ok(None) => {
                    return self.refuse(node, "this op is not known on numbers that do not depend on the tokens");
                }
                Err(why) => return self.refuse(node, why),
            }
        }
        self.spent += made.iter().flatten().map(|n| n.data.len()).sum::<usize>();
        if self.spent > super::numbers::TOTAL {
            return self.refuse(node, "too many numbers would have to be computed");
        }
        let [a, b] = [made.first(), made.get(1)].map(|m| m.cloned().unwrap_or_default());
        Ok(a.into_iter().zip(b).map(|(a, b)| Thing::Known([a, b])).collect())
    }

    /// Notes a large constant that positions are moved by or compared with, or puts the short one in its place.
    fn distances(&mut self, node: &Node, sides: &mut [Vec<Option<Numbers>>; 2]) {
        const MOVES: [&str; 6] = ["Add", "Sub", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"];
        let positions = |n: &Option<Numbers>| n.as_ref().is_some_and(|n| n.whole && n.data.len() > 1);
        for side in sides {
            if !MOVES.contains(&node.op.as_str()) || !side.iter().any(positions) {
                continue;
            }
            for number in side.iter_mut().flatten() {
                let far = number.only().filter(|v| number.whole && (SEQ.size[1] as f64..16e6).contains(v));
                match (far, self.instead) {
                    (Some(far), Some((from, to))) if far == from => number.data = vec![to],
                    (Some(far), _) => self.far = Some(far),
                    (None, _) => {}
                }
            }
        }
    }

    fn constant(&self, node: &Node) -> Result<Thing, ImportError> {
        let known = |n: Numbers| Ok(Thing::Known([n.clone(), n]));
        let list = |data: Vec<f64>, whole| Numbers::new(vec![data.len()], data, whole);
        match node.attributes.iter().next() {
            // Tensors of constants are found under the name of the result.
            Some((_, Attribute::Tensor(tensor))) => {
                let numbers = self.numbers(tensor).map_err(|e| self.unreadable(&place(node), e))?;
                known(numbers)
            }
            Some((_, Attribute::Int(n))) => known(Numbers::scalar(*n as f64, true)),
            Some((_, Attribute::Float(v))) => known(Numbers::scalar(f64::from(*v), false)),
            Some((_, Attribute::Ints(l))) => known(list(l.iter().map(|n| *n as f64).collect(), true)),
            Some((_, Attribute::Floats(l))) => known(list(l.iter().map(|n| f64::from(*n)).collect(), false)),
            Some((_, Attribute::Text(_) | Attribute::Other)) | None => self.refuse(node, "a constant of unknown kind"),
        }
    }

    fn filled(&self, node: &Node, shape: Option<&Numbers>) -> Result<Vec<Numbers>, String> {
        let shape: Vec<usize> =
            shape.map(Numbers::ints).unwrap_or_default().iter().map(|d| (*d).max(0) as usize).collect();
        let n = super::numbers::count(&shape)?;
        let (value, whole) = match node.attributes.get("value") {
            Some(Attribute::Tensor(t)) => {
                (self.numbers(t)?.only().ok_or("the filling is not one number")?, !t.kind.is_float())
            }
            Some(_) | None => (0.0, false),
        };
        Ok(vec![Numbers::new(shape, vec![value; n], whole)])
    }

    /// An op that leaves a weight a weight, or makes rows of it for each position.
    fn weight_op(&mut self, node: &Node, term: &Term, rest: &[Option<Thing>]) -> Result<Option<Thing>, ImportError> {
        let vector = |shape: &[usize]| shape.iter().filter(|d| **d != 1).count() <= 1;
        Ok(match (node.op.as_str(), rest) {
            ("Identity" | "Cast" | "Dropout", _) => Some(Thing::Weight(term.clone())),
            ("Transpose", _) if term.shape.len() == 2 => {
                let perm = ints(node, "perm", None);
                let turns = perm.is_none_or(|p| p == [1, 0]);
                let mut out = term.clone();
                if turns {
                    out.shape.reverse();
                    out.transposed = !out.transposed;
                }
                Some(Thing::Weight(out))
            }
            ("Add" | "Sub", [Some(Thing::Known(k))]) if vector(&term.shape) && node.op == "Add" => {
                k[0].only().map(|c| Thing::Weight(Term { plus: term.plus + c, ..term.clone() }))
            }
            ("Gather", [Some(Thing::Known(at))]) if term.shape.len() == 2 && int(node, "axis").unwrap_or(0) == 0 => {
                let Some(offset) = facts::positions(at) else { return Ok(None) };
                let width = term.shape[1];
                let table = self.matrix(node, term);
                let ids = Operand::Value(self.positions);
                let made = self.emit(node, Embedding { offset }, vec![ids, Operand::Weight(table)])?;
                let mut axes = vec![Vec::new(); at[0].shape.len().saturating_sub(1)];
                axes.extend([vec![SEQ], vec![channels(width, 1)]]);
                Some(Thing::Value(Val { id: made, form: Form::Table, channels: width, view: View(axes) }))
            }
            _other => None,
        })
    }

    // ---- making --------------------------------------------------------------------------------------------------

    /// Appends a node with one result.
    pub(super) fn emit(
        &mut self,
        node: &Node,
        op: impl Into<Op>,
        operands: Vec<Operand>,
    ) -> Result<ValueId, ImportError> {
        let name = value_name(node).unwrap_or_else(|| node.op.to_lowercase());
        self.emit_all(node, op.into(), operands, &[&name]).map(|(first, _)| first)
    }

    /// Appends a node; its first and its last result.
    pub(super) fn emit_all(
        &mut self,
        node: &Node,
        op: Op,
        operands: Vec<Operand>,
        names: &[&str],
    ) -> Result<(ValueId, ValueId), ImportError> {
        match self.region.append(op, operands, names, &[]) {
            Ok(id) => {
                let results = &self.region.node(id).results;
                match (results.first(), results.last()) {
                    (Some(first), Some(last)) => Ok((*first, *last)),
                    _none => self.refuse(node, "it has no result"),
                }
            }
            Err(e) => self.refuse(node, e),
        }
    }

    /// Appends an ONNX op that rewrites are to recognise.
    pub(super) fn foreign(
        &mut self,
        node: &Node,
        op: &str,
        operands: Vec<Operand>,
        mut attributes: Map<String, Json>,
        result: Type,
    ) -> Result<ValueId, ImportError> {
        attributes.insert("node".into(), place(node).into());
        let weighted = operands.iter().any(|o| o.weight().is_some());
        let name = value_name(node).filter(|_| weighted).unwrap_or_else(|| op.to_lowercase());
        let op = awqc_ir::op::Foreign { op: op.into(), results: vec![result], attributes };
        self.emit_all(node, op.into(), operands, &[&name]).map(|(first, _)| first)
    }

    /// The type of a value of this form.
    pub(super) fn ty(&self, form: Form, channels: usize) -> Type {
        let (b, s, c) = (Dim::Sym("B".into()), Dim::Sym("S".into()), Dim::Const(channels as u64));
        match form {
            Form::Ids => Type::new(Elem::I32, [b, s]),
            Form::Rows => Type::new(self.elem, [b, s, c]),
            Form::Table => Type::new(self.elem, [s, c]),
            Form::Scores => Type::new(self.elem, [b, c, s.clone(), s]),
        }
    }
}

/// The element type of most weights.
fn most(graph: &Graph) -> Elem {
    let mut counts = [(Elem::F32, 0u128), (Elem::F16, 0), (Elem::Bf16, 0)];
    for tensor in graph.tensors.values() {
        let at = match tensor.kind {
            Kind::F32 | Kind::F64 => 0,
            Kind::F16 => 1,
            Kind::Bf16 => 2,
            Kind::I32 | Kind::I64 | Kind::Bool => continue,
        };
        counts[at].1 += u128::from(tensor.size().unwrap_or(0));
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or(Elem::F32, |(elem, _)| elem)
}

/// What messages call a node.
pub(super) fn place(node: &Node) -> String {
    let output = node.outputs.first().map_or("", String::as_str);
    if node.name.is_empty() { output.to_owned() } else { node.name.clone() }
}

/// The dotted path of the module that a node belongs to, if its name says: `/model/layers.0/self_attn/q_proj/MatMul`.
pub(super) fn scope(node: &Node) -> Option<String> {
    let path = node.name.strip_prefix('/')?;
    let (module, _) = path.rsplit_once('/')?;
    Some(module.replace('/', "."))
}

/// The name of a node's module, without the numbers of layers.
fn value_name(node: &Node) -> Option<String> {
    let word = |w: &&str| w.parse::<u32>().is_err() && !w.is_empty();
    scope(node)?
        .rsplit('.')
        .find(word)
        .map(|w| w.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect())
}
