//! Scale freedom: which channels of a region can be re-scaled without changing its function.
//!
//! Every channel of every value, and of every axis of every weight, has an unknown positive factor. Each op's
//! [law](awqc_ir::op::law) relates the factors that it touches; region parameters and results, and whatever else must
//! stay as it is, have the factor 1. Union-find over the unknowns, against the distinguished element ONE, leaves the
//! classes that may be chosen freely. Grouped by the values that they touch they are the *sites*: a norm's gain and
//! the projections that read it, the value projection and the output projection, up and down.
//!
//! What an unknown of a weight stands for depends on the weight's *sense*: a linear's columns undo the factor of its
//! input, so their factor is its inverse. A weight that is used in both senses along one axis is pinned.
//!
//! A value of several experts has unknowns for each of them, and so has each matrix of a stack: what lies between the
//! two linears of an expert is scaled apart from the other experts.
//!
//! Pinned besides parameters and results: weights that are not float or not constant in shape; weights that share
//! numbers with a weight of another region, or with another weight of this one; axes that some use of the weight has
//! no law for; everything at a fused call (look for sites before fusing).
//!
//! Reference: AWQ (arXiv 2306.00978, section 3.2) folds `diag(s)⁻¹` into the op before; here that op is found by
//! algebra instead of by a table of model families.

mod apply;
mod classes;
mod sharing;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use awqc_ir::op::law::{Law, Port, Sense};
use awqc_ir::{Node, Operand, Region, ValueId, WeightId};

pub use apply::{apply, data_map, per_channel};
use classes::{Classes, ONE};

/// A set of scales that can be chosen freely, and everything that they touch.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// How many scales can be chosen.
    pub free: usize,
    /// Parameters to divide by the scales: they make the values smaller.
    pub producers: Vec<ParamUse>,
    /// Parameters to multiply by the scales: they undo it. All are columns of linears.
    pub consumers: Vec<ParamUse>,
    /// The values that come out divided, in order of definition.
    pub values: Vec<ValueUse>,
}

/// One axis of a weight that a site scales.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamUse {
    /// The weight.
    pub weight: WeightId,
    /// Its axis.
    pub axis: usize,
    /// For each channel of the axis the index of its scale, or `None` where it stays. In a stack of matrices, the
    /// channels of all matrices, one matrix after the other.
    pub entry: Vec<Option<u32>>,
    /// The op adds this to the parameter, so what is scaled is `w + offset`.
    pub offset: f64,
}

/// One value that a site scales.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueUse {
    /// The value.
    pub value: ValueId,
    /// For each channel the index of its scale, or `None` where it stays; for a value of several experts, the channels
    /// of all experts, one expert after the other.
    pub entry: Vec<Option<u32>>,
}

/// The sites of a region, in program order of what produces them. `shared` are the full names of tensors that other
/// regions use too.
pub fn sites(region: &Region, shared: &BTreeSet<String>) -> Vec<Site> {
    let mut solver = Solver::new(region);
    for v in region.value_params().chain(region.results().iter().copied()) {
        solver.pin_value(v);
    }
    for w in region.used_weights() {
        if !region.weight(w).ty.elem.is_float() {
            solver.pin_weight(w);
        }
    }
    for w in sharing::pinned(region, shared) {
        solver.pin_weight(w);
    }
    for (_, node) in region.nodes() {
        solver.impose(node);
    }
    solver.resolve_products();
    solver.sites()
}

/// One line for people: `ln1 -> q, k, v (64 free)`; a part of an axis shows as `qkv[96..128]`, or
/// `qkv[48 of 24..144]`.
pub fn describe(region: &Region, site: &Site) -> String {
    let side = |params: &[ParamUse]| params.iter().map(|p| name(region, p)).collect::<Vec<_>>().join(", ");
    format!("{} -> {} ({} free)", side(&site.producers), side(&site.consumers), site.free)
}

fn name(region: &Region, param: &ParamUse) -> String {
    let label = super::linears::label(region, param.weight);
    let scaled = |e: &Option<u32>| e.is_some();
    match (param.entry.iter().position(scaled), param.entry.iter().rposition(scaled)) {
        (Some(first), Some(last)) if last - first + 1 < param.entry.len() => {
            let count = param.entry.iter().filter(|e| scaled(e)).count();
            // Rows of one head after the other do not lie together.
            let of = if count < last - first + 1 { format!("{count} of ") } else { String::new() };
            format!("{label}[{of}{first}..{}]", last + 1)
        }
        (Some(_) | None, Some(_) | None) => label,
    }
}

/// What is known of a weight axis that some law mentions.
struct Axis {
    run: Run,
    sense: Sense,
    offset: f64,
}

/// The unknowns of a value or a weight axis: those of each expert, or matrix of a stack, in turn.
#[derive(Clone, Copy)]
struct Run {
    first: u32,
    experts: u32,
    channels: u32,
}

impl Run {
    fn all(self) -> Range<u32> {
        self.first..self.first + self.experts * self.channels
    }

    /// The unknown of channel `c` of expert `e`; the first expert's where there is one set for all.
    fn at(self, e: u32, c: u32) -> u32 {
        self.first + if self.experts == 1 { 0 } else { e * self.channels } + c
    }

    /// Every expert and channel.
    fn each(self) -> impl Iterator<Item = (u32, u32)> {
        (0..self.experts).flat_map(move |e| (0..self.channels).map(move |c| (e, c)))
    }

    /// Whether each of this run's experts has its counterpart in `other`.
    fn meets(self, other: Run) -> bool {
        other.experts == self.experts || other.experts == 1
    }
}

/// New unknowns for the channels of some experts, unless there are too many.
fn run(classes: &mut Classes, experts: u64, channels: u64) -> Unknowns {
    let first = classes.add(experts.checked_mul(channels)?)?;
    Some(Run { first, experts: u32::try_from(experts).ok()?, channels: u32::try_from(channels).ok()? })
}

struct Solver<'r> {
    region: &'r Region,
    classes: Classes,
    /// The unknowns of each value, where it has a constant number of channels.
    values: Vec<Unknowns>,
    /// In order of first mention, so that answers are in program order.
    axes: Vec<((WeightId, usize), Axis)>,
    products: Vec<[Unknowns; 3]>,
}

/// The unknowns of a value, or nothing where it cannot be scaled.
type Unknowns = Option<Run>;

impl<'r> Solver<'r> {
    fn new(region: &'r Region) -> Self {
        let mut classes = Classes::new();
        let values = region
            .value_ids()
            .map(|v| {
                let ty = &region.value(v).ty;
                let channels = ty.channels().filter(|_| ty.elem.is_float())?;
                run(&mut classes, ty.experts(), channels)
            })
            .collect();
        Self { region, classes, values, axes: Vec::new(), products: Vec::new() }
    }

    fn unknowns(&self, value: ValueId) -> Unknowns {
        self.values.get(value.index()).copied().flatten()
    }

    fn pin(&mut self, unknowns: Unknowns) {
        if let Some(run) = unknowns {
            run.all().for_each(|u| self.classes.join(u, ONE));
        }
    }

    fn pin_value(&mut self, value: ValueId) {
        self.pin(self.unknowns(value));
    }

    fn pin_weight(&mut self, weight: WeightId) {
        for axis in 0..self.region.weight(weight).ty.rank() {
            self.pin_axis(weight, axis);
        }
    }

    fn pin_axis(&mut self, weight: WeightId, axis: usize) {
        if let Some(at) = self.axis(weight, axis, Sense::Along, 0.0) {
            self.pin(Some(self.axes[at].1.run));
        }
    }

    /// The place of a weight axis among the known ones.
    fn axis(&mut self, weight: WeightId, axis: usize, sense: Sense, offset: f64) -> Option<usize> {
        if let Some(at) = self.axes.iter().position(|(key, _)| *key == (weight, axis)) {
            return Some(at);
        }
        let ty = &self.region.weight(weight).ty;
        let channels = ty.shape.get(axis)?.as_const()?;
        let experts = ty.channels_of_all(axis).map_or(1, |all| all / channels.max(1));
        let run = run(&mut self.classes, experts, channels)?;
        self.axes.push(((weight, axis), Axis { run, sense, offset }));
        Some(self.axes.len() - 1)
    }

    fn port(&self, node: &Node, port: Port) -> Option<Operand> {
        match port {
            Port::Operand(i) => node.operands.get(i).copied(),
            Port::Result(i) => node.results.get(i).map(|v| Operand::Value(*v)),
        }
    }

    fn port_unknowns(&self, node: &Node, port: Port) -> Unknowns {
        self.port(node, port).and_then(Operand::value).and_then(|v| self.unknowns(v))
    }

    /// Adds the equations of one node.
    fn impose(&mut self, node: &Node) {
        let operands: Vec<_> = node.operands.iter().map(|o| self.region.operand_type(*o)).collect();
        let results: Vec<_> = node.results.iter().map(|r| &self.region.value(*r).ty).collect();
        // Which channels of which weight axes this node's laws speak of; the others are fixed by it.
        let mut covered: BTreeMap<(usize, usize), BTreeSet<u64>> = BTreeMap::new();
        for law in node.op.scale_law(&operands, &results) {
            match law {
                Law::Pin(port) => match self.port(node, port) {
                    Some(Operand::Value(v)) => self.pin_value(v),
                    Some(Operand::Weight(w)) => self.pin_weight(w),
                    None => {}
                },
                Law::Tie { left, right, map } => {
                    let sides = (self.port_unknowns(node, left), self.port_unknowns(node, right));
                    let (Some(l), Some(r)) = sides else {
                        self.pin(sides.0);
                        self.pin(sides.1);
                        continue;
                    };
                    if !l.meets(r) {
                        self.pin(sides.0);
                        self.pin(sides.1);
                        continue;
                    }
                    for (e, c) in l.each() {
                        let other = u32::try_from(map.apply(c.into())).ok().filter(|o| *o < r.channels);
                        self.classes.join(l.at(e, c), other.map_or(ONE, |o| r.at(e, o)));
                    }
                }
                Law::Product { product, a, b } => {
                    self.products.push([product, a, b].map(|p| self.port_unknowns(node, p)));
                }
                Law::Parameter { operand, axis, value, sense, map, offset } => {
                    let value = self.port_unknowns(node, value);
                    let Some(weight) = node.operands.get(operand).and_then(|o| o.weight()) else { continue };
                    let Some(at) = self.axis(weight, axis, sense, offset) else {
                        self.pin(value);
                        continue;
                    };
                    let Some(value) = value else { continue };
                    let known = &self.axes[at].1;
                    let run = known.run;
                    let agrees = known.sense == sense && known.offset == offset && value.meets(run);
                    let covered = covered.entry((operand, axis)).or_default();
                    for (e, c) in value.each() {
                        let channel = map.apply(c.into());
                        covered.insert(channel);
                        match u32::try_from(channel).ok().filter(|ch| *ch < run.channels) {
                            Some(ch) if agrees => self.classes.join(value.at(e, c), run.at(e, ch)),
                            Some(ch) => {
                                self.classes.join(value.at(e, c), ONE);
                                (0..run.experts).for_each(|e| self.classes.join(run.at(e, ch), ONE));
                            }
                            None => self.classes.join(value.at(e, c), ONE),
                        }
                    }
                }
            }
        }
        for (i, operand) in node.operands.iter().enumerate() {
            if let Operand::Weight(w) = operand {
                for axis in 0..self.region.weight(*w).ty.rank() {
                    self.pin_uncovered(*w, axis, covered.get(&(i, axis)));
                }
            }
        }
    }

    fn pin_uncovered(&mut self, weight: WeightId, axis: usize, covered: Option<&BTreeSet<u64>>) {
        let Some(covered) = covered else { return self.pin_axis(weight, axis) };
        if let Some(at) = self.axis(weight, axis, Sense::Along, 0.0) {
            let run = self.axes[at].1.run;
            for (e, c) in run.each().filter(|(_, c)| !covered.contains(&u64::from(*c))) {
                self.classes.join(run.at(e, c), ONE);
            }
        }
    }

    /// σ(product) = σ(a) + σ(b): where one factor is 1 the other one's scale passes. Where neither is, the first
    /// factor is pinned, one op at a time, which may settle others.
    fn resolve_products(&mut self) {
        let mut open: Vec<[u32; 3]> = Vec::new();
        let mut starts = Vec::new();
        for product in std::mem::take(&mut self.products) {
            let [Some(p), Some(a), Some(b)] = product else {
                product.into_iter().for_each(|u| self.pin(u));
                continue;
            };
            starts.push(open.len());
            open.extend(p.all().zip(a.all()).zip(b.all()).map(|((p, a), b)| [p, a, b]));
        }
        let mut settled = vec![false; open.len()];
        loop {
            let mut progress = false;
            for (done, [p, a, b]) in settled.iter_mut().zip(&open).filter(|(done, _)| !**done) {
                let passes = if self.classes.is_one(*a) {
                    *b
                } else if self.classes.is_one(*b) {
                    *a
                } else {
                    continue;
                };
                self.classes.join(*p, passes);
                (*done, progress) = (true, true);
            }
            if progress {
                continue;
            }
            let Some(first) = settled.iter().position(|done| !done) else { return };
            let end = starts.iter().copied().find(|s| *s > first).unwrap_or(open.len());
            for ([_, a, _], _) in open[first..end].iter().zip(&settled[first..end]).filter(|(_, done)| !**done) {
                self.classes.join(*a, ONE);
            }
        }
    }

    fn sites(mut self) -> Vec<Site> {
        // The values that each class touches, classes and values in order of first channel.
        let mut order: Vec<u32> = Vec::new();
        let mut touched: BTreeMap<u32, BTreeSet<ValueId>> = BTreeMap::new();
        for v in self.region.value_ids() {
            for u in self.unknowns(v).into_iter().flat_map(Run::all) {
                let class = self.classes.find(u);
                if class == ONE {
                    continue;
                }
                if !touched.contains_key(&class) {
                    order.push(class);
                }
                touched.entry(class).or_default().insert(v);
            }
        }
        let mut groups: Vec<(&BTreeSet<ValueId>, BTreeMap<u32, u32>)> = Vec::new();
        for class in order {
            let Some(values) = touched.get(&class) else { continue };
            let at = match groups.iter().position(|(v, _)| *v == values) {
                Some(at) => at,
                None => {
                    groups.push((values, BTreeMap::new()));
                    groups.len() - 1
                }
            };
            let index = groups[at].1.len() as u32;
            groups[at].1.insert(class, index);
        }
        let axes = std::mem::take(&mut self.axes);
        groups
            .into_iter()
            .filter_map(|(values, index)| {
                let (mut producers, mut consumers) = (Vec::new(), Vec::new());
                for ((weight, axis), known) in &axes {
                    let entry = self.entries(known.run, &index);
                    if entry.iter().any(Option::is_some) {
                        let side = match known.sense {
                            Sense::Along => &mut producers,
                            Sense::Against => &mut consumers,
                        };
                        side.push(ParamUse { weight: *weight, axis: *axis, entry, offset: known.offset });
                    }
                }
                let values = values
                    .iter()
                    .filter_map(|v| {
                        let run = self.unknowns(*v)?;
                        Some(ValueUse { value: *v, entry: self.entries(run, &index) })
                    })
                    .collect();
                let useful = !producers.is_empty() && !consumers.is_empty();
                useful.then_some(Site { free: index.len(), producers, consumers, values })
            })
            .collect()
    }

    fn entries(&mut self, run: Run, index: &BTreeMap<u32, u32>) -> Vec<Option<u32>> {
        run.all().map(|u| index.get(&self.classes.find(u)).copied()).collect()
    }
}
