//! A region: a straight-line piece of the model, isolated from above. Only its parameters come in, only its results
//! go out; its weights and data are its own.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::id::{DataId, NodeId, ValueId, WeightId};
use crate::module::FusedDef;
use crate::op::{Op, OpError, Operand};
use crate::ty::{Name, Type};
use crate::weight::{Weight, WeightExpr};

/// What a region is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegionName {
    /// `@embed`, `@head`, …; blocks beside the layers end in a number, `@vision.0`.
    Named(Name),
    /// `layer @3`: one of the repeated blocks; quantization and scale fusion work on these.
    Layer(u32),
}

impl RegionName {
    /// Whether it is one of the repeated blocks.
    pub fn is_layer(&self) -> bool {
        match self {
            RegionName::Layer(_) => true,
            RegionName::Named(_) => false,
        }
    }

    /// The stem and the number of a region that is one of several blocks: `vision.3`.
    pub fn numbered(&self) -> Option<(&str, u32)> {
        match self {
            RegionName::Layer(_) => None,
            RegionName::Named(name) => {
                let (stem, number) = name.rsplit_once('.')?;
                let canonical = number == "0" || !number.starts_with('0');
                let digits = canonical && number.bytes().all(|b| b.is_ascii_digit());
                Some((stem, number.parse().ok().filter(|_| digits)?))
            }
        }
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegionName::Named(name) => write!(f, "@{name}"),
            RegionName::Layer(i) => write!(f, "@{i}"),
        }
    }
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Def {
    /// The region's parameter at this position.
    Param(usize),
    /// A node's result at this position.
    Result(NodeId, usize),
}

/// A tensor that flows through the region.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// For people; no pass reads it.
    pub name: Name,
    /// Its type.
    pub ty: Type,
    /// Where it comes from.
    pub def: Def,
}

/// One application of an op.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Inputs, in the op's order.
    pub operands: Vec<Operand>,
    /// Outputs, in the op's order.
    pub results: Vec<ValueId>,
}

/// Numbers that a pass made. The text form carries only name, label and shape; the numbers live in a sidecar.
#[derive(Clone, Debug, PartialEq)]
pub struct Data {
    /// For people: `s0` of `#s0`.
    pub name: Name,
    /// What it is, for people: `scales "attn_in"`.
    pub label: Name,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The numbers, if they are at hand.
    pub values: Option<Arc<[f32]>>,
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Region {
    /// What it is called.
    pub name: RegionName,
    /// Prepended, with a dot, to the tensor names of [`WeightExpr::Source`]; empty for none.
    pub prefix: Name,
    params: Vec<Operand>,
    results: Vec<ValueId>,
    nodes: Vec<Option<Node>>,
    order: Vec<NodeId>,
    values: Vec<Value>,
    weights: Vec<Weight>,
    data: Vec<Data>,
}

impl Region {
    /// An empty region.
    pub fn new(name: RegionName, prefix: impl Into<Name>) -> Self {
        Self {
            name,
            prefix: prefix.into(),
            params: Vec::new(),
            results: Vec::new(),
            nodes: Vec::new(),
            order: Vec::new(),
            values: Vec::new(),
            weights: Vec::new(),
            data: Vec::new(),
        }
    }

    // ---- reading -------------------------------------------------------------------------------------------------

    /// Parameters, in order. Weights occur among them only in the body of a fused op.
    pub fn params(&self) -> &[Operand] {
        &self.params
    }

    /// The parameters that are values.
    pub fn value_params(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.params.iter().filter_map(|p| p.value())
    }

    /// Results, in order.
    pub fn results(&self) -> &[ValueId] {
        &self.results
    }

    /// The live nodes in program order, which is topological.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> + '_ {
        self.order.iter().map(|&id| (id, self.node(id)))
    }

    /// Ids of the live nodes in program order.
    pub fn order(&self) -> &[NodeId] {
        &self.order
    }

    /// A live node.
    ///
    /// # Panics
    /// If the node was removed: ids must not be kept across removals.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()].as_ref().expect("the node was removed")
    }

    /// The node, unless it was removed.
    pub fn get_node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index()).and_then(Option::as_ref)
    }

    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// A weight.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }

    /// A data entry.
    pub fn data(&self, id: DataId) -> &Data {
        &self.data[id.index()]
    }

    /// Every value, used or not.
    pub fn value_ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.values.len()).map(ValueId::new)
    }

    /// Every weight, used or not.
    pub fn weight_ids(&self) -> impl Iterator<Item = WeightId> + use<> {
        (0..self.weights.len()).map(WeightId::new)
    }

    /// Every data entry, used or not.
    pub fn data_ids(&self) -> impl Iterator<Item = DataId> + use<> {
        (0..self.data.len()).map(DataId::new)
    }

    /// One past the largest node index ever used.
    pub fn node_bound(&self) -> usize {
        self.nodes.len()
    }

    /// The type of an operand.
    pub fn operand_type(&self, operand: Operand) -> &Type {
        match operand {
            Operand::Value(v) => &self.value(v).ty,
            Operand::Weight(w) => &self.weight(w).ty,
        }
    }

    /// The weights that some node uses directly, in order of first use, each once.
    pub fn used_weights(&self) -> Vec<WeightId> {
        let mut seen = BTreeSet::new();
        let operands = self.nodes().flat_map(|(_, n)| n.operands.iter().filter_map(|o| o.weight()));
        operands.filter(|w| seen.insert(*w)).collect()
    }

    /// `roots` and everything below them, children before parents, each once.
    pub fn weight_closure(&self, roots: &[WeightId]) -> Vec<WeightId> {
        fn visit(region: &Region, id: WeightId, seen: &mut BTreeSet<WeightId>, out: &mut Vec<WeightId>) {
            if seen.insert(id) {
                for child in region.weight(id).expr.children() {
                    visit(region, *child, seen, out);
                }
                out.push(id);
            }
        }
        let (mut seen, mut out) = (BTreeSet::new(), Vec::new());
        for root in roots {
            visit(self, *root, &mut seen, &mut out);
        }
        out
    }

    /// The checkpoint tensors below a weight, by relative name, each once, in order.
    pub fn sources(&self, root: WeightId) -> Vec<Name> {
        let mut names = Vec::new();
        for id in self.weight_closure(&[root]) {
            let name = match &self.weight(id).expr {
                WeightExpr::Source(name) | WeightExpr::Packed { tensor: name, .. } => name,
                WeightExpr::Param(_)
                | WeightExpr::Mul { .. }
                | WeightExpr::Div { .. }
                | WeightExpr::Offset { .. }
                | WeightExpr::Cat { .. }
                | WeightExpr::Stack(_)
                | WeightExpr::Rows { .. }
                | WeightExpr::Transpose(_)
                | WeightExpr::Clip { .. }
                | WeightExpr::Codes { .. }
                | WeightExpr::Quant(_)
                | WeightExpr::Pack(_) => continue,
            };
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// The full name of a checkpoint tensor of this region.
    pub fn tensor_name(&self, relative: &str) -> String {
        if self.prefix.is_empty() { relative.to_owned() } else { format!("{}.{relative}", self.prefix) }
    }

    // ---- building ------------------------------------------------------------------------------------------------

    /// Adds a parameter.
    pub fn add_param(&mut self, name: impl Into<Name>, ty: Type) -> ValueId {
        let id = self.new_value(name.into(), ty, Def::Param(self.params.len()));
        self.params.push(Operand::Value(id));
        id
    }

    /// Adds a weight parameter: only meaningful in the body of a fused op.
    pub fn add_weight_param(&mut self, name: impl Into<Name>, ty: Type) -> WeightId {
        let id = self.add_weight(Some(name.into()), WeightExpr::Param(self.params.len()), ty);
        self.params.push(Operand::Weight(id));
        id
    }

    /// Adds a weight. A weight without a name prints inside the expression that uses it.
    pub fn add_weight(&mut self, name: Option<Name>, expr: WeightExpr, ty: Type) -> WeightId {
        let id = WeightId::new(self.weights.len());
        self.weights.push(Weight { name, expr, ty });
        id
    }

    /// Adds a data entry.
    pub fn add_data(&mut self, data: Data) -> DataId {
        let id = DataId::new(self.data.len());
        self.data.push(data);
        id
    }

    /// Appends a node; its result types are inferred. `names` are hints; missing ones become `vN`.
    ///
    /// # Errors
    /// When the operands do not fit the op; the region is then unchanged.
    pub fn append(
        &mut self,
        op: Op,
        operands: Vec<Operand>,
        names: &[&str],
        fused: &[FusedDef],
    ) -> Result<NodeId, OpError> {
        self.insert(self.order.len(), op, operands, names, fused)
    }

    /// Inserts a node just before `before`; otherwise as [`Region::append`].
    ///
    /// # Errors
    /// When the operands do not fit the op; the region is then unchanged.
    pub fn insert_before(
        &mut self,
        before: NodeId,
        op: Op,
        operands: Vec<Operand>,
        names: &[&str],
        fused: &[FusedDef],
    ) -> Result<NodeId, OpError> {
        let at = self.position(before);
        self.insert(at, op, operands, names, fused)
    }

    /// The place of a live node in program order.
    pub fn position(&self, node: NodeId) -> usize {
        self.order.iter().position(|n| *n == node).expect("the node was removed")
    }

    fn insert(
        &mut self,
        at: usize,
        op: Op,
        operands: Vec<Operand>,
        names: &[&str],
        fused: &[FusedDef],
    ) -> Result<NodeId, OpError> {
        let types: Vec<&Type> = operands.iter().map(|o| self.operand_type(*o)).collect();
        let kinds: Vec<bool> = operands.iter().map(|o| o.weight().is_some()).collect();
        let results = op.infer(&kinds, &types, fused)?;
        let id = NodeId::new(self.nodes.len());
        let results = results
            .into_iter()
            .enumerate()
            .map(|(i, ty)| {
                let name = names.get(i).map_or_else(|| format!("v{}", self.values.len()).into(), |n| (*n).into());
                self.new_value(name, ty, Def::Result(id, i))
            })
            .collect();
        self.nodes.push(Some(Node { op, operands, results }));
        self.order.insert(at, id);
        Ok(id)
    }

    fn new_value(&mut self, name: Name, ty: Type, def: Def) -> ValueId {
        let id = ValueId::new(self.values.len());
        self.values.push(Value { name, ty, def });
        id
    }

    /// Sets the results.
    pub fn set_results(&mut self, results: Vec<ValueId>) {
        self.results = results;
    }

    // ---- rewriting -----------------------------------------------------------------------------------------------

    /// Replaces every use of `old`, results included, by `new`.
    pub fn replace_value(&mut self, old: ValueId, new: ValueId) {
        for node in self.nodes.iter_mut().flatten() {
            for operand in &mut node.operands {
                if *operand == Operand::Value(old) {
                    *operand = Operand::Value(new);
                }
            }
        }
        self.results.iter_mut().filter(|r| **r == old).for_each(|r| *r = new);
    }

    /// Removes a node. Its results stay as dangling values until nothing uses them; the verifier rejects a use.
    pub fn remove(&mut self, id: NodeId) {
        self.nodes[id.index()] = None;
        self.order.retain(|n| *n != id);
    }

    /// Removes many nodes; otherwise as [`Region::remove`].
    pub fn remove_all(&mut self, ids: &BTreeSet<NodeId>) {
        for id in ids {
            if let Some(slot) = self.nodes.get_mut(id.index()) {
                *slot = None;
            }
        }
        self.order.retain(|n| !ids.contains(n));
    }

    /// Puts the live nodes into another order, if `order` holds each of them once; answers whether it did. The verifier
    /// checks that definitions still come before uses.
    pub fn reorder(&mut self, order: Vec<NodeId>) -> bool {
        let (now, then): (BTreeSet<_>, BTreeSet<_>) = (self.order.iter().collect(), order.iter().collect());
        let permutes = order.len() == self.order.len() && now == then;
        if permutes {
            self.order = order;
        }
        permutes
    }

    /// Changes one operand of a node. The verifier checks that it still fits.
    pub fn set_operand(&mut self, node: NodeId, index: usize, operand: Operand) {
        if let Some(slot) = self.nodes[node.index()].as_mut().and_then(|n| n.operands.get_mut(index)) {
            *slot = operand;
        }
    }

    /// Changes what a node computes, its operands and results as they are. The verifier checks that they still fit.
    pub fn set_op(&mut self, node: NodeId, op: Op) {
        if let Some(slot) = self.nodes[node.index()].as_mut() {
            slot.op = op;
        }
    }

    /// Puts `wrap(old)` in place of a weight: the term moves to a new unnamed entry and `id`, name and uses unchanged,
    /// becomes the term that `wrap` makes of it, of type `ty`.
    pub fn wrap_weight(&mut self, id: WeightId, ty: Type, wrap: impl FnOnce(WeightId) -> WeightExpr) {
        let Weight { expr, ty: old, .. } = self.weight(id).clone();
        let inner = self.add_weight(None, expr, old);
        let outer = &mut self.weights[id.index()];
        outer.expr = wrap(inner);
        outer.ty = ty;
    }

    /// Replaces a weight's term and type in place.
    pub fn set_weight(&mut self, id: WeightId, expr: WeightExpr, ty: Type) {
        let weight = &mut self.weights[id.index()];
        weight.expr = expr;
        weight.ty = ty;
    }

    /// Gives a weight a name, or takes it.
    pub fn rename_weight(&mut self, id: WeightId, name: Option<Name>) {
        self.weights[id.index()].name = name;
    }

    /// Gives a value a name.
    pub fn rename_value(&mut self, id: ValueId, name: Name) {
        self.values[id.index()].name = name;
    }

    /// Sets or drops the numbers of a data entry.
    pub fn set_data_values(&mut self, id: DataId, values: Option<Arc<[f32]>>) {
        self.data[id.index()].values = values;
    }

    /// A name that no data entry has yet: `base` and the smallest free number.
    pub fn fresh_data_name(&self, base: &str) -> Name {
        let taken: BTreeSet<&str> = self.data.iter().map(|d| &*d.name).collect();
        fresh(base, &|n| taken.contains(n), true)
    }

    /// `base`, or `base` with the smallest number that makes it new among the named weights.
    pub fn fresh_weight_name(&self, base: &str) -> Name {
        let taken: BTreeSet<&str> = self.weights.iter().filter_map(|w| w.name.as_deref()).collect();
        fresh(base, &|n| taken.contains(n), false)
    }

    /// `base`, or `base` with the smallest number that makes it new among the values.
    pub fn fresh_value_name(&self, base: &str) -> Name {
        let taken: BTreeSet<&str> = self.values.iter().map(|v| &*v.name).collect();
        fresh(base, &|n| taken.contains(n), false)
    }

    /// Drops removed nodes and unused values, weights and data, and renumbers what stays. Ids change: the answer says
    /// what became of each value.
    pub fn compact(&mut self) -> Vec<Option<ValueId>> {
        let mut out = Region::new(self.name.clone(), self.prefix.clone());
        let roots: Vec<WeightId> =
            self.used_weights().into_iter().chain(self.params.iter().filter_map(|p| p.weight())).collect();
        let live: BTreeSet<WeightId> = self.weight_closure(&roots).into_iter().collect();
        // In the order of the old ids, so that definitions keep their place.
        let mut weight_map = vec![None; self.weights.len()];
        let mut data_map = vec![None; self.data.len()];
        for id in &live {
            weight_map[id.index()] = Some(WeightId::new(out.weights.len()));
            out.weights.push(self.weight(*id).clone());
            for d in self.weight(*id).expr.data() {
                data_map[d.index()] = Some(d);
            }
        }
        for slot in &mut data_map {
            if let Some(old) = *slot {
                *slot = Some(out.add_data(self.data(old).clone()));
            }
        }
        let weight = |id: WeightId| weight_map[id.index()].expect("a child of a live weight is live");
        let data = |id: DataId| data_map[id.index()].expect("data of a live weight is live");
        for w in &mut out.weights {
            w.expr = w.expr.map_children(weight).map_data(data);
        }
        let mut value_map = vec![None; self.values.len()];
        for (i, param) in self.params.iter().enumerate() {
            let param = match *param {
                Operand::Value(v) => {
                    let old = self.value(v);
                    let new = out.new_value(old.name.clone(), old.ty.clone(), Def::Param(i));
                    value_map[v.index()] = Some(new);
                    Operand::Value(new)
                }
                Operand::Weight(w) => Operand::Weight(weight(w)),
            };
            out.params.push(param);
        }
        for (_, node) in self.nodes() {
            let id = NodeId::new(out.nodes.len());
            let operands = node
                .operands
                .iter()
                .map(|o| match *o {
                    Operand::Value(v) => Operand::Value(value_map[v.index()].expect("operands are defined before use")),
                    Operand::Weight(w) => Operand::Weight(weight(w)),
                })
                .collect();
            let mut results = Vec::with_capacity(node.results.len());
            for (i, r) in node.results.iter().enumerate() {
                let old = self.value(*r);
                let new = out.new_value(old.name.clone(), old.ty.clone(), Def::Result(id, i));
                value_map[r.index()] = Some(new);
                results.push(new);
            }
            out.nodes.push(Some(Node { op: node.op.clone(), operands, results }));
            out.order.push(id);
        }
        out.results = self.results.iter().map(|r| value_map[r.index()].expect("results are defined")).collect();
        *self = out;
        value_map
    }
}

fn fresh(base: &str, taken: &dyn Fn(&str) -> bool, numbered: bool) -> Name {
    if !numbered && !taken(base) {
        return base.into();
    }
    (0u64..).map(|i| format!("{base}{i}")).find(|n| !taken(n)).expect("numbers do not run out").into()
}

/// Who uses a value: built once, then looked up.
#[derive(Debug)]
pub struct Uses {
    of: Vec<Vec<(NodeId, usize)>>,
    result: Vec<bool>,
}

impl Uses {
    /// Indexes `region`.
    pub fn of(region: &Region) -> Self {
        let mut of = vec![Vec::new(); region.values.len()];
        for (id, node) in region.nodes() {
            for (i, operand) in node.operands.iter().enumerate() {
                if let Operand::Value(v) = operand {
                    of[v.index()].push((id, i));
                }
            }
        }
        let mut result = vec![false; region.values.len()];
        for r in region.results() {
            result[r.index()] = true;
        }
        Self { of, result }
    }

    /// The nodes and operand positions that use `value`, in program order.
    pub fn nodes(&self, value: ValueId) -> &[(NodeId, usize)] {
        &self.of[value.index()]
    }

    /// Whether the region returns `value`.
    pub fn is_result(&self, value: ValueId) -> bool {
        self.result[value.index()]
    }

    /// Number of uses, a return counting as one.
    pub fn count(&self, value: ValueId) -> usize {
        self.nodes(value).len() + usize::from(self.is_result(value))
    }
}
