//! A module as text. Printing never fails: what the verifier would refuse prints as well as it can.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::diag::Span;
use crate::id::{DataId, NodeId, ValueId, WeightId};
use crate::module::Module;
use crate::op::{Op, Operand};
use crate::region::{Node, Region, RegionName};
use crate::ty::{Dim, Elem, Group, Name, Type};
use crate::weight::{DataMap, DataRef, WeightExpr};

use super::attr;
use super::lex::quote;
use super::names;
use super::parse::VERSION;
use super::term::below;

/// Lines longer than this do not widen the columns of their block.
const COLUMN: usize = 100;

/// Terms that nest deeper than this get lines of their own.
const NESTING: usize = 8;

/// How the first line of a region reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `region @name` or `layer @3`.
    Region,
    /// `fused @name`.
    Fused,
}

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Entity {
    /// The first line.
    Header,
    /// A definition of data.
    Data(DataId),
    /// A definition of a weight, or a term within one.
    Weight(WeightId),
    /// A node.
    Node(NodeId),
    /// The last line.
    Return,
}

/// A data entry or weight with a line of its own.
pub(crate) struct Definition {
    /// Its name with its sigil.
    pub(crate) name: String,
    /// What stands after `=`.
    pub(crate) is: String,
    /// Its type.
    pub(crate) ty: String,
}

/// A region's names and definitions as they print, taken apart.
pub(crate) struct Tables {
    names: Names,
    pub(crate) data: Vec<Definition>,
    pub(crate) weights: Vec<Definition>,
}

impl Tables {
    /// The name of a value with its sigil.
    pub(crate) fn value(&self, id: ValueId) -> String {
        self.names.operand(Operand::Value(id))
    }

    /// The name of an operand with its sigil.
    pub(crate) fn operand(&self, operand: Operand) -> String {
        self.names.operand(operand)
    }
}

/// See [`Tables`].
pub(crate) fn tables(region: &Region, dtype: Elem) -> Tables {
    let lines = Lines::of(region, dtype);
    let (mut data, mut weights) = (Vec::new(), Vec::new());
    for row in lines.definitions {
        let list = if row.lhs.starts_with('#') { &mut data } else { &mut weights };
        list.push(Definition { name: row.lhs, is: row.rhs, ty: row.ty });
    }
    Tables { names: lines.names, data, weights }
}

/// The line of each node, in program order.
pub(crate) fn line_text(region: &Region) -> Vec<String> {
    let rows = Lines::of(region, Elem::F16).nodes.into_iter();
    rows.map(|row| format!("{} = {} : {}", row.lhs, row.rhs, row.ty)).collect()
}

/// A region's text and where its parts stand in it.
pub(crate) struct Printed {
    pub(crate) text: String,
    pub(crate) places: BTreeMap<Entity, Span>,
}

/// See [`super::print`].
pub(super) fn module(module: &Module) -> String {
    let mut out = format!("awqir {VERSION}\nmodel {} {{dtype={}", quote(&module.name), module.dtype);
    let header = module.header.iter().filter(|(k, v)| *k != "dtype" && !v.is_null());
    let header: serde_json::Map<_, _> = header.map(|(k, v)| (k.clone(), v.clone())).collect();
    if !header.is_empty() {
        let _ = write!(out, ", {}", attr::fields(&header));
    }
    let dims = if module.dims.is_empty() { "none".to_owned() } else { module.dims.join(", ") };
    let _ = writeln!(out, "}}\ndim {dims}");
    for def in &module.fused {
        let _ = write!(
            out,
            "\nfused @{} {}",
            names::legal(&def.name, "f"),
            whole(&Lines::of(&def.body, module.dtype), None)
        );
    }
    let mut rest = module.regions.as_slice();
    while let Some(first) = rest.first() {
        let body = Lines::of(first, module.dtype);
        let template = layer_prefix(first);
        let alike = rest.iter().enumerate().skip(1).take_while(|(n, region)| {
            follows(first, region, *n)
                && layer_prefix(region) == template
                && Lines::of(region, module.dtype).same(&body)
        });
        let count = 1 + alike.count();
        match (&first.name, count) {
            (RegionName::Layer(i), 2..) => {
                let last = *i as usize + count - 1;
                let _ = write!(out, "\nlayer @{i}..{last} {}", whole(&body, Some(&template)));
            }
            (RegionName::Named(_), 2..) => {
                let last = first.name.numbered().map_or(0, |(_, i)| i as usize) + count - 1;
                let _ = write!(out, "\n{}..{last} {}", title(first, Form::Region), whole(&body, Some(&template)));
            }
            (RegionName::Layer(_) | RegionName::Named(_), _) => {
                let _ = write!(out, "\n{} {}", title(first, Form::Region), whole(&body, Some(&inside(&first.prefix))));
            }
        }
        rest = &rest[count..];
    }
    out
}

/// One region, with its places.
pub(crate) fn print_mapped(module: &Module, region: &Region, form: Form) -> Printed {
    let lines = Lines::of(region, module.dtype);
    let mut text = format!("{} ", title(region, form));
    let mut places = BTreeMap::new();
    let prefix = inside(&region.prefix);
    lines.write(&mut text, Some(&prefix), &mut |entity, span| {
        places.insert(entity, span);
    });
    places.insert(Entity::Header, Span { start: 0, end: text.find('\n').unwrap_or(text.len()) });
    for (inner, outer) in &lines.within {
        if let Some(span) = places.get(&Entity::Weight(*outer)).copied() {
            places.insert(Entity::Weight(*inner), span);
        }
    }
    Printed { text, places }
}

fn title(region: &Region, form: Form) -> String {
    let name = match &region.name {
        RegionName::Named(name) => names::legal(name, "r"),
        RegionName::Layer(i) => i.to_string(),
    };
    match (form, &region.name) {
        (Form::Fused, _) => format!("fused @{name}"),
        (Form::Region, RegionName::Layer(_)) => format!("layer @{name}"),
        (Form::Region, RegionName::Named(_)) => format!("region @{name}"),
    }
}

/// Whether `region` is the layer, or the numbered region, `n` after `first`.
fn follows(first: &Region, region: &Region, n: usize) -> bool {
    match (&first.name, &region.name) {
        (RegionName::Layer(a), RegionName::Layer(b)) => *b as usize == *a as usize + n,
        (RegionName::Named(_), RegionName::Named(_)) => match (first.name.numbered(), region.name.numbered()) {
            (Some((stem, a)), Some((other, b))) => stem == other && b as usize == a as usize + n,
            (Some(_) | None, Some(_) | None) => false,
        },
        (RegionName::Layer(_) | RegionName::Named(_), _) => false,
    }
}

/// A string as it stands between its quotes.
fn inside(s: &str) -> String {
    let quoted = quote(s);
    quoted[1..quoted.len() - 1].to_owned()
}

/// The prefix of a layer, or of a numbered region, with its number, if it is a part of its own, replaced by `{i}`.
fn layer_prefix(region: &Region) -> String {
    let number = match &region.name {
        RegionName::Layer(i) => Some(*i),
        RegionName::Named(_) => region.name.numbered().map(|(_, i)| i),
    };
    let Some(number) = number.map(|i| i.to_string()) else { return inside(&region.prefix) };
    let mut parts: Vec<String> = region.prefix.split('.').map(inside).collect();
    if let Some(part) = parts.iter_mut().rev().find(|p| **p == number) {
        *part = "{i}".into();
    }
    parts.join(".")
}

fn whole(lines: &Lines, prefix: Option<&str>) -> String {
    let mut out = String::new();
    lines.write(&mut out, prefix, &mut |_, _| {});
    out
}

/// `lhs = rhs : type`.
struct Row {
    entity: Entity,
    lhs: String,
    rhs: String,
    ty: String,
}

/// A region, printed but not yet put together.
struct Lines {
    names: Names,
    params: String,
    definitions: Vec<Row>,
    nodes: Vec<Row>,
    returns: String,
    /// Terms that print inside the line of another weight.
    within: BTreeMap<WeightId, WeightId>,
}

/// The names of a region.
struct Names {
    values: BTreeMap<ValueId, String>,
    weights: BTreeMap<WeightId, String>,
    data: BTreeMap<DataId, String>,
}

fn named<K: Ord>(map: &BTreeMap<K, String>, key: &K) -> String {
    map.get(key).cloned().unwrap_or_else(|| "_".into())
}

impl Lines {
    fn of(region: &Region, dtype: Elem) -> Self {
        let roots = region.used_weights().into_iter().chain(region.params().iter().filter_map(|p| p.weight()));
        let mut live = region.weight_closure(&roots.collect::<Vec<_>>());
        live.sort_unstable();
        let order = region.weight_closure(&live);
        let within = nested(region, &order, dtype);
        let own: Vec<WeightId> = order.iter().copied().filter(|w| !within.contains_key(w)).collect();

        let mut data: Vec<DataId> = order.iter().flat_map(|w| region.weight(*w).expr.data()).collect();
        data.sort_unstable();
        data.dedup();
        let names = Names {
            values: value_names(region),
            weights: own
                .iter()
                .copied()
                .zip(names::unique(own.iter().map(|w| region.weight(*w).name.as_ref()), "w"))
                .collect(),
            data: data
                .iter()
                .copied()
                .zip(names::unique(data.iter().map(|d| Some(&region.data(*d).name)), "s"))
                .collect(),
        };
        let entries = data.iter().map(|id| {
            let entry = region.data(*id);
            let ty = Type::new(Elem::F32, entry.shape.iter().copied().map(Dim::Const));
            Row {
                entity: Entity::Data(*id),
                lhs: format!("#{}", named(&names.data, id)),
                rhs: format!("data {}", quote(&entry.label)),
                ty: ty.to_string(),
            }
        });
        let weights = own.iter().filter(|w| !matches!(region.weight(**w).expr, WeightExpr::Param(_))).map(|id| Row {
            entity: Entity::Weight(*id),
            lhs: format!("${}", named(&names.weights, id)),
            rhs: names.term(region, *id, &within),
            ty: region.weight(*id).ty.to_string(),
        });
        let definitions = entries.chain(weights).collect();
        let nodes = region.nodes().map(|(id, node)| names.node(region, id, node)).collect();
        let returns = region.results().iter().map(|r| format!("%{}", named(&names.values, r))).collect::<Vec<_>>();
        let param = |p: &Operand| format!("{}: {}", names.operand(*p), region.operand_type(*p));
        let params = region.params().iter().map(param).collect::<Vec<_>>().join(", ");
        Self { names, params, definitions, nodes, returns: returns.join(", "), within }
    }

    /// Whether both print the same, whatever they are called.
    fn same(&self, other: &Lines) -> bool {
        let rows = |a: &[Row], b: &[Row]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.lhs == b.lhs && a.rhs == b.rhs && a.ty == b.ty)
        };
        self.params == other.params
            && self.returns == other.returns
            && rows(&self.definitions, &other.definitions)
            && rows(&self.nodes, &other.nodes)
    }

    /// From the parameters to the closing brace.
    fn write(&self, out: &mut String, prefix: Option<&str>, place: &mut dyn FnMut(Entity, Span)) {
        let _ = write!(out, "({})", self.params);
        if let Some(prefix) = prefix.filter(|p| !p.is_empty()) {
            let _ = write!(out, " from \"{prefix}\"");
        }
        out.push_str(" {\n");
        block(out, &self.definitions, place);
        if !self.definitions.is_empty() && !self.nodes.is_empty() {
            out.push('\n');
        }
        block(out, &self.nodes, place);
        let start = out.len() + 2;
        let _ = write!(out, "  return {}", self.returns);
        place(Entity::Return, Span { start, end: out.len() });
        out.push_str("\n}\n");
    }
}

/// Rows with their columns aligned.
fn block(out: &mut String, rows: &[Row], place: &mut dyn FnMut(Entity, Span)) {
    let width =
        |f: fn(&Row) -> &String| rows.iter().map(|r| f(r).chars().count()).filter(|n| *n <= COLUMN).max().unwrap_or(0);
    let (left, right) = (width(|r| &r.lhs), width(|r| &r.rhs));
    for row in rows {
        let start = out.len() + 2;
        let _ = write!(out, "  {:left$} = {:right$} : {}", row.lhs, row.rhs, row.ty);
        place(row.entity, Span { start, end: out.len() });
        out.push('\n');
    }
}

fn value_names(region: &Region) -> BTreeMap<ValueId, String> {
    let params = region.value_params();
    let results = region.nodes().flat_map(|(_, n)| n.results.iter().copied());
    let mut seen = BTreeSet::new();
    // Dangling values come last, so that they do not take the names of live ones.
    let ids: Vec<ValueId> = params.chain(results).chain(region.value_ids()).filter(|v| seen.insert(*v)).collect();
    let names = names::unique(ids.iter().map(|v| Some(&region.value(*v).name)), "v");
    ids.into_iter().zip(names).collect()
}

/// The terms that print inside another weight's line, and whose line that is: unnamed, used once, and of the type that
/// the parser gives to a term in that place.
fn nested(region: &Region, order: &[WeightId], dtype: Elem) -> BTreeMap<WeightId, WeightId> {
    let mut uses: BTreeMap<WeightId, usize> = BTreeMap::new();
    let operands = region.nodes().flat_map(|(_, n)| n.operands.iter()).chain(region.params());
    // A weight that a node uses has a line.
    operands.filter_map(|o| o.weight()).for_each(|w| *uses.entry(w).or_default() += 2);
    for w in order {
        region.weight(*w).expr.children().iter().for_each(|c| *uses.entry(*c).or_default() += 1);
    }
    let mut within = BTreeMap::new();
    // Outer terms come before inner ones here, so what is not within a line by now begins one.
    for root in order.iter().rev() {
        if !within.contains_key(root) {
            descend(region, *root, &uses, dtype, &mut within);
        }
    }
    within
}

fn descend(
    region: &Region,
    root: WeightId,
    uses: &BTreeMap<WeightId, usize>,
    dtype: Elem,
    within: &mut BTreeMap<WeightId, WeightId>,
) {
    let ty = &region.weight(root).ty;
    let mut open = vec![(root, Some(ty.shape.clone()), 0)];
    while let Some((outer, shape, depth)) = open.pop() {
        let weight = region.weight(outer);
        let hint = below(&weight.expr, Some(weight.ty.elem), shape.as_deref(), dtype);
        for child in weight.expr.children() {
            let inner = region.weight(*child);
            let alone = inner.name.is_none() && uses.get(child).is_some_and(|n| *n == 1) && *child != root;
            if alone
                && depth < NESTING
                && follows_type(region, &inner.expr, &inner.ty, hint.elem, hint.shape.as_deref())
            {
                within.insert(*child, root);
                open.push((*child, hint.shape.clone(), depth + 1));
            }
        }
    }
}

/// Whether the parser gives a nested `expr` the type `ty` where `elem` and `shape` follow from the term above.
fn follows_type(region: &Region, expr: &WeightExpr, ty: &Type, elem: Option<Elem>, shape: Option<&[Dim]>) -> bool {
    let inferred = expr.infer_shape(|w| region.weight(w).ty.clone(), |d| region.data(d).shape.clone());
    let layout = match expr {
        WeightExpr::Param(_) | WeightExpr::Pack(_) => return false,
        WeightExpr::Packed { layout, .. } => Some(*layout),
        WeightExpr::Source(_)
        | WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Cat { .. }
        | WeightExpr::Stack(_)
        | WeightExpr::Rows { .. }
        | WeightExpr::Transpose(_)
        | WeightExpr::Clip { .. }
        | WeightExpr::Codes { .. }
        | WeightExpr::Quant(_) => None,
    };
    let fits = match (inferred, shape) {
        (Err(_), _) | (Ok(None), None) => false,
        (Ok(Some(found)), None) => found == ty.shape,
        (Ok(Some(found)), Some(said)) => found == ty.shape && said == ty.shape,
        (Ok(None), Some(said)) => said == ty.shape,
    };
    fits && elem == Some(ty.elem) && layout == ty.layout
}

/// The pattern of the parts of a stack, if they are tensors that print inside it and whose names count from 0: quoted,
/// with `{e}` for the number.
fn counted(region: &Region, parts: &[WeightId], within: &BTreeMap<WeightId, WeightId>) -> Option<String> {
    let mut names: Vec<&Name> = Vec::with_capacity(parts.len());
    for w in parts {
        let (WeightExpr::Source(name), true) = (&region.weight(*w).expr, within.contains_key(w)) else { return None };
        names.push(name);
    }
    let first = *names.first()?;
    let alone = |at: usize| {
        let digit = |i: Option<usize>| i.and_then(|i| first.as_bytes().get(i)).is_some_and(u8::is_ascii_digit);
        !digit(at.checked_sub(1)) && !digit(Some(at + 1))
    };
    first.match_indices('0').filter(|(at, _)| alone(*at)).find_map(|(at, _)| {
        let (head, tail) = (&first[..at], &first[at + 1..]);
        let fits = names.iter().enumerate().all(|(e, n)| ***n == *format!("{head}{e}{tail}"));
        let (head, tail) = (quote(head), quote(tail));
        fits.then(|| format!("{}{{e}}{}", head.get(..head.len() - 1).unwrap_or("\""), tail.get(1..).unwrap_or("\"")))
    })
}

impl Names {
    fn operand(&self, operand: Operand) -> String {
        match operand {
            Operand::Value(v) => format!("%{}", named(&self.values, &v)),
            Operand::Weight(w) => format!("${}", named(&self.weights, &w)),
        }
    }

    fn node(&self, region: &Region, id: NodeId, node: &Node) -> Row {
        let results: Vec<String> = node.results.iter().map(|r| format!("%{}", named(&self.values, r))).collect();
        let types: Vec<String> = node.results.iter().map(|r| region.value(*r).ty.to_string()).collect();
        let operands = node.operands.iter().map(|o| self.operand(*o)).collect::<Vec<_>>().join(", ");
        let rhs = if let Op::Fused(call) = &node.op {
            format!("fused @{}({operands})", names::legal(&call.callee, "f"))
        } else {
            let attributes = node.op.attributes();
            let shown =
                if attributes.is_empty() { String::new() } else { format!(" {{{}}}", attr::fields(&attributes)) };
            format!("{} {operands}{shown}", node.op.mnemonic())
        };
        Row { entity: Entity::Node(id), lhs: results.join(", "), rhs, ty: types.join(", ") }
    }

    fn factors(&self, by: &DataRef) -> String {
        let name = named(&self.data, &by.id);
        match by.map {
            DataMap::Whole => format!("#{name}"),
            DataMap::Tie { width, times } => format!("tie(#{name}, {width}, {times})"),
            DataMap::Within { start, total } => format!("within(#{name}, {start}, {total})"),
        }
    }

    fn term(&self, region: &Region, id: WeightId, within: &BTreeMap<WeightId, WeightId>) -> String {
        let child = |w: &WeightId| {
            if within.contains_key(w) { self.term(region, *w, within) } else { format!("${}", named(&self.weights, w)) }
        };
        match &region.weight(id).expr {
            WeightExpr::Source(name) => quote(name),
            WeightExpr::Packed { tensor, layout } => format!("packed.{layout}({})", quote(tensor)),
            WeightExpr::Param(i) => format!("param({i})"),
            WeightExpr::Mul { axis, of, by } => format!("mul.{axis}({}, {})", child(of), self.factors(by)),
            WeightExpr::Div { axis, of, by } => format!("div.{axis}({}, {})", child(of), self.factors(by)),
            WeightExpr::Offset { of, by } => format!("offset({}, {by:?})", child(of)),
            WeightExpr::Cat { axis, parts } => {
                format!("cat.{axis}({})", parts.iter().map(child).collect::<Vec<_>>().join(", "))
            }
            WeightExpr::Stack(parts) => match counted(region, parts, within) {
                Some(pattern) => format!("stack(e in 0..{}, {pattern})", parts.len()),
                None => format!("stack({})", parts.iter().map(child).collect::<Vec<_>>().join(", ")),
            },
            WeightExpr::Rows { of, start, len } => format!("rows({}, {start}, {len})", child(of)),
            WeightExpr::Transpose(of) => format!("transpose({})", child(of)),
            WeightExpr::Clip { of, lo, hi, group } => {
                let group = match group {
                    Group::Size(n) => format!("g{n}"),
                    Group::Row => "row".to_owned(),
                };
                format!("clip({}, #{}, #{}, {group})", child(of), named(&self.data, lo), named(&self.data, hi))
            }
            WeightExpr::Quant(of) => format!("quant({})", child(of)),
            WeightExpr::Codes { of, codes, scales, zeros } => {
                let [q, s, z] = [codes, scales, zeros].map(|d| named(&self.data, d));
                format!("codes({}, #{q}, #{s}, #{z})", child(of))
            }
            WeightExpr::Pack(of) => format!("pack({})", child(of)),
        }
    }
}
