//! Finds where the lines of a pattern occur in a region, and says how far it got where they nearly do.
//!
//! A match is rooted: the last line of the pattern is tried at one node; every other line is then found from what is
//! bound already, as the definer of a bound value or as a user of one. The search is depth-first, in program order
//! and operand order, and takes the first match: same region, same answer.

use std::collections::BTreeMap;

use awqc_ir::{Def, Node, NodeId, Op, Operand, Region, Uses, ValueId, WeightId};
use serde_json::{Map, Value as Json};

use super::rule::{Line, Term};
use super::variables::variable;

/// Where a pattern occurs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Match {
    /// The node of each line.
    pub nodes: Vec<NodeId>,
    /// The value of each `%name`.
    pub values: BTreeMap<String, ValueId>,
    /// The weight of each `$name`; `None` for an optional one that is not there.
    pub weights: BTreeMap<String, Option<WeightId>>,
    /// What each variable stands for; null for an attribute that is not there.
    pub attributes: Map<String, Json>,
}

/// Why a pattern does not occur at a node, at the place where most of its lines were found.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Miss {
    /// Lines found.
    pub found: usize,
    /// Why the next one was not.
    pub why: String,
}

impl Miss {
    fn keep_better(&mut self, found: usize, why: impl FnOnce() -> String) {
        if self.why.is_empty() || found > self.found {
            *self = Self { found, why: why() };
        }
    }
}

/// The first match whose last line is `root`.
///
/// # Errors
/// The nearest miss.
pub(super) fn find(lines: &[Line], region: &Region, uses: &Uses, root: NodeId) -> Result<Match, Miss> {
    let mut search = Search { lines, region, uses, miss: Miss::default() };
    let start = State { nodes: vec![None; lines.len()], ..State::default() };
    let found = match lines.len().checked_sub(1) {
        Some(last) => search.bind(&start, last, root),
        None => None,
    };
    found.ok_or(search.miss)
}

#[derive(Clone, Default)]
struct State {
    nodes: Vec<Option<NodeId>>,
    values: BTreeMap<String, ValueId>,
    weights: BTreeMap<String, Option<WeightId>>,
    attributes: Map<String, Json>,
}

struct Search<'a> {
    lines: &'a [Line],
    region: &'a Region,
    uses: &'a Uses,
    miss: Miss,
}

impl Search<'_> {
    /// Takes `node` for `line` and goes on with the other lines.
    fn bind(&mut self, state: &State, line: usize, node: NodeId) -> Option<Match> {
        let found = state.nodes.iter().flatten().count();
        if state.nodes.contains(&Some(node)) {
            return None;
        }
        let pattern = &self.lines[line];
        let at = self.region.node(node);
        if let Err(why) = same_op(pattern, at) {
            let name = at.results.first().map_or_else(String::new, |r| format!(" at %{}", self.region.value(*r).name));
            self.miss.keep_better(found, || format!("`{}` is needed{name}, {why}", pattern.text));
            return None;
        }
        for order in orders(at) {
            let mut next = state.clone();
            next.nodes[line] = Some(node);
            match bind_attributes(pattern, at, &mut next).and_then(|()| bind_names(pattern, at, order, &mut next)) {
                Ok(()) => {
                    if let Some(done) = self.advance(&next) {
                        return Some(done);
                    }
                }
                Err(why) => self.miss.keep_better(found, || format!("`{}` does not fit: {why}", pattern.text)),
            }
        }
        None
    }

    /// Chooses the next line and tries its candidates.
    fn advance(&mut self, state: &State) -> Option<Match> {
        let open = || (0..self.lines.len()).rev().filter(|i| state.nodes[*i].is_none());
        let found = state.nodes.iter().flatten().count();
        // The definer of a bound value is a single candidate: these lines first.
        let defined = open().find_map(|i| {
            let result = self.lines[i].results.iter().find_map(|r| state.values.get(r))?;
            Some((i, *result))
        });
        if let Some((line, value)) = defined {
            return match self.region.value(value).def {
                Def::Result(node, _) => self.bind(state, line, node),
                Def::Param(_) => {
                    let (text, name) = (&self.lines[line].text, &self.region.value(value).name);
                    self.miss.keep_better(found, || format!("`{text}` is needed, but %{name} is a parameter"));
                    None
                }
            };
        }
        let used = open().find_map(|i| {
            let bound = |t: &Term| match t {
                Term::Value(name) => state.values.get(name).copied(),
                Term::Weight { .. } => None,
            };
            Some((i, self.lines[i].operands.iter().find_map(bound)?))
        });
        if let Some((line, value)) = used {
            let users: Vec<NodeId> = self.uses.nodes(value).iter().map(|(node, _)| *node).collect();
            if users.iter().all(|u| state.nodes.contains(&Some(*u))) {
                let (text, name) = (&self.lines[line].text, &self.region.value(value).name);
                self.miss.keep_better(found, || format!("`{text}` is needed, but nothing else uses %{name}"));
            }
            return users.into_iter().find_map(|node| self.bind(state, line, node));
        }
        let nodes: Option<Vec<NodeId>> = state.nodes.iter().copied().collect();
        let State { values, weights, attributes, .. } = state.clone();
        Some(Match { nodes: nodes?, values, weights, attributes })
    }
}

/// The orders in which the operands may be read: both where the op commutes.
fn orders(node: &Node) -> &'static [[usize; 2]] {
    let commutes = match &node.op {
        Op::Foreign(f) => matches!(f.op.as_str(), "Add" | "Mul"),
        op => matches!(op, Op::Add(_) | Op::Mul(_)),
    } && node.operands.len() == 2;
    if commutes { &[[0, 1], [1, 0]] } else { &[[0, 1]] }
}

/// Whether mnemonic and written attributes agree.
fn same_op(line: &Line, node: &Node) -> Result<(), String> {
    if node.op.mnemonic() != line.mnemonic {
        return Err(format!("this is {}", node.op.mnemonic()));
    }
    if node.results.len() != line.results.len() {
        return Err(format!("this one has {} results", node.results.len()));
    }
    if !line.attributes.is_empty() {
        // Written attributes over the node's own: if that changes nothing, they agree, defaults included.
        let mut attributes = node.op.attributes();
        let fixed = line.attributes.iter().filter(|(_, v)| variable(v).is_none());
        attributes.extend(fixed.map(|(k, v)| (k.clone(), v.clone())));
        if Op::from_attributes(&line.mnemonic, attributes).as_ref() != Ok(&node.op) {
            return Err("this one has other attributes".into());
        }
    }
    Ok(())
}

/// Binds the variables of a line to the attributes of the node, or says which of them stands for something else.
fn bind_attributes(line: &Line, node: &Node, state: &mut State) -> Result<(), String> {
    let mut variables = line.attributes.iter().filter_map(|(key, v)| Some((key, variable(v)?))).peekable();
    if variables.peek().is_none() {
        return Ok(());
    }
    let own = node.op.attributes();
    for (key, name) in variables {
        let value = own.get(key).cloned().unwrap_or(Json::Null);
        match state.attributes.insert(name.to_owned(), value.clone()) {
            Some(old) if old != value => return Err(format!("{name} would be {old} and, as `{key}`, {value}")),
            Some(_) | None => {}
        }
    }
    Ok(())
}

/// Binds the names of a line to operands and results, or says which of them is bound to something else.
fn bind_names(line: &Line, node: &Node, order: &[usize; 2], state: &mut State) -> Result<(), String> {
    let mut operands = node.operands.iter();
    let swapped = [node.operands.get(order[0]), node.operands.get(order[1])];
    for (i, term) in line.operands.iter().enumerate() {
        let plain = operands.next();
        let operand = swapped.get(i).copied().flatten().or(plain);
        match (term, operand) {
            (Term::Value(name), Some(Operand::Value(value))) => bind_value(state, name, *value)?,
            (Term::Weight { name, .. }, Some(Operand::Weight(weight))) => bind_weight(state, name, Some(*weight))?,
            (Term::Weight { name, optional: true }, None) => bind_weight(state, name, None)?,
            (Term::Value(name), None) => return Err(format!("there is no operand for %{name}")),
            (Term::Weight { name, .. }, None) => return Err(format!("there is no operand for ${name}")),
            (Term::Value(name), Some(Operand::Weight(_))) => {
                return Err(format!("the operand for %{name} is a weight"));
            }
            (Term::Weight { name, .. }, Some(Operand::Value(_))) => {
                return Err(format!("the operand for ${name} is a value"));
            }
        }
    }
    if operands.next().is_some() {
        return Err(format!("this one has {} operands", node.operands.len()));
    }
    line.results.iter().zip(&node.results).try_for_each(|(name, value)| bind_value(state, name, *value))
}

fn bind_value(state: &mut State, name: &str, value: ValueId) -> Result<(), String> {
    match state.values.insert(name.to_owned(), value) {
        Some(old) if old != value => Err(format!("%{name} would be two different values")),
        Some(_) | None => Ok(()),
    }
}

fn bind_weight(state: &mut State, name: &str, weight: Option<WeightId>) -> Result<(), String> {
    match state.weights.insert(name.to_owned(), weight) {
        Some(old) if old != weight => Err(format!("${name} would be two different weights")),
        Some(_) | None => Ok(()),
    }
}
