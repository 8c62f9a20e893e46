//! Rules as data: what a rewrite matches, under which guards, and what it puts in place.
//!
//! A rule that produces `fused @name(…)` without a definition *outlines*: the matched nodes that its results need
//! become the body, so it is correct by construction. Other matched lines are context. Any other rule puts new ops, or
//! a value that is there already, in place of matched results.

use std::collections::BTreeSet;

use awqc_ir::text::{holds, parse_fragment_with};
use awqc_ir::{Def, NodeId, Op, Operand, Region, Uses, ValueId};
use serde_json::{Map, Value as Json};

use super::matcher::{self, Match};
use super::patch::{Input, NewOp, Outline, Patch, Replace};
use super::variables::{Matched, variable, variables};
use super::{Found, Rewrite};

/// An operand of a pattern line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Term {
    /// `%name`.
    Value(String),
    /// `$name`, or `$name?` for a trailing operand that may be left out.
    Weight {
        /// The name.
        name: String,
        /// Whether it may be left out.
        optional: bool,
    },
}

impl Term {
    /// The name with its sigil.
    fn sigil(&self) -> String {
        match self {
            Term::Value(name) => format!("%{name}"),
            Term::Weight { name, .. } => format!("${name}"),
        }
    }
}

/// `%a, %b = mnemonic %x, $w {attributes}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The text, for messages.
    pub text: String,
    /// Result names.
    pub results: Vec<String>,
    /// The op.
    pub mnemonic: String,
    /// Operands, in order.
    pub operands: Vec<Term>,
    /// Written attributes: these must be equal, others may be anything. A word in capitals is a variable, which stands
    /// for whatever the attribute is.
    pub attributes: Map<String, Json>,
}

/// A condition on what a pattern bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// `single_use(%v)`: exactly one operand or region result is this value.
    SingleUse(String),
    /// `same_type(%a, %b)`.
    SameType(String, String),
    /// `without(%v, key)`: the op that makes this value has no such attribute, or has it at its default.
    Without(String, String),
    /// `holds(condition)`: an expression over the variables, and `x.channels`, the channels of `%x`.
    Holds(String),
}

/// How a new node's op is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Make {
    /// It is always this one.
    Op(Op),
    /// Its line, with variables in it.
    Text(String),
}

/// What a rule puts in place.
#[derive(Clone, Debug, PartialEq)]
pub enum Produce {
    /// The matched nodes that the results need, as a fused op.
    Outline {
        /// The fused op's name.
        kernel: String,
        /// The call's operands.
        operands: Vec<Term>,
        /// The call's results: names of matched results.
        results: Vec<String>,
    },
    /// New nodes, and values that are there already.
    Replace {
        /// New nodes with their ops.
        ops: Vec<(Line, Make)>,
        /// `%old = %new`.
        aliases: Vec<(String, String)>,
    },
}

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// What messages and statistics call it.
    pub name: String,
    /// What it matches.
    pub lines: Vec<Line>,
    /// Conditions.
    pub guards: Vec<Guard>,
    /// What it puts in place.
    pub produce: Produce,
}

impl Make {
    /// The op for a match, or why there is none.
    fn op(&self, line: &Line, names: &Matched<'_>) -> Result<Op, String> {
        match self {
            Make::Op(op) => Ok(op.clone()),
            Make::Text(text) => {
                let read = parse_fragment_with(text, names).map_err(|e| e.to_string())?;
                let mut attributes = read.lines.into_iter().next().map(|l| l.attributes).unwrap_or_default();
                attributes.retain(|_, v| *v != serde_json::Value::Bool(false));
                Op::from_attributes(&line.mnemonic, attributes).map_err(|e| e.0)
            }
        }
    }
}

impl Rule {
    /// Checks that names are bound, the pattern hangs together and the produced ops exist.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut bound = BTreeSet::new();
        for line in &self.lines {
            for result in &line.results {
                if !bound.insert(format!("%{result}")) {
                    return Err(format!("%{result} is defined twice"));
                }
            }
            if !Op::MNEMONICS.contains(&line.mnemonic.as_str()) || line.mnemonic == "fused" {
                return Err(format!("`{}` is not an op that can be matched", line.mnemonic));
            }
            // Unknown attributes come to light here; a missing one only means that anything goes.
            let fixed = line.attributes.iter().filter(|(_, v)| variable(v).is_none());
            let fixed = fixed.map(|(k, v)| (k.clone(), v.clone())).collect();
            if let Err(e) = Op::from_attributes(&line.mnemonic, fixed)
                && !e.0.contains("missing field")
            {
                return Err(e.0);
            }
        }
        let defined = bound.clone();
        bound.extend(self.lines.iter().flat_map(|l| l.operands.iter().map(Term::sigil)));
        let missing = |name: &str| Err(format!("{name} does not occur in `match`"));
        let captured: BTreeSet<&str> =
            self.lines.iter().flat_map(|l| l.attributes.values().filter_map(variable)).collect();
        for guard in &self.guards {
            let (a, b) = match guard {
                Guard::SingleUse(a) => (a, a),
                Guard::SameType(a, b) => (a, b),
                Guard::Without(a, _) if !defined.contains(&format!("%{a}")) => {
                    return Err(format!("%{a} is not defined in `match`"));
                }
                Guard::Without(a, _) => (a, a),
                Guard::Holds(text) => match variables(text).iter().find(|v| !captured.contains(v.as_str())) {
                    Some(name) => return missing(name),
                    None => continue,
                },
            };
            for name in [format!("%{a}"), format!("%{b}")] {
                if !bound.contains(&name) {
                    return missing(&name);
                }
            }
        }
        self.check_connected()?;
        match &self.produce {
            Produce::Outline { operands, results, .. } => {
                if let Some(r) = results.iter().find(|r| !defined.contains(&format!("%{r}"))) {
                    return Err(format!("%{r} is not defined in `match`"));
                }
                let given: BTreeSet<String> = operands.iter().map(Term::sigil).collect();
                let needed = self.captures(&self.body(results));
                if let Some(name) = given.iter().find(|n| !needed.contains(*n)) {
                    return Err(format!("{name} is no input of the matched nodes that the results need"));
                }
                match needed.iter().find(|n| !given.contains(*n)) {
                    Some(name) => Err(format!("the fused op also needs {name}")),
                    None => Ok(()),
                }
            }
            Produce::Replace { ops, aliases } => {
                let mut replaced = false;
                for (line, make) in ops {
                    if let Make::Text(text) = make
                        && let Some(name) = variables(text).iter().find(|v| !captured.contains(v.as_str()))
                    {
                        return missing(name);
                    }
                    if let Some(name) = line.operands.iter().map(Term::sigil).find(|n| !bound.contains(n)) {
                        return missing(&name);
                    }
                    replaced |= line.results.iter().any(|r| defined.contains(&format!("%{r}")));
                    bound.extend(line.results.iter().map(|r| format!("%{r}")));
                }
                for (old, new) in aliases {
                    if !bound.contains(&format!("%{new}")) {
                        return missing(&format!("%{new}"));
                    }
                    replaced |= defined.contains(&format!("%{old}"));
                }
                if replaced { Ok(()) } else { Err("`produce` defines none of the matched results".into()) }
            }
        }
    }

    /// Every line must be reachable from the last one by values.
    fn check_connected(&self) -> Result<(), String> {
        let names = |l: &Line| -> BTreeSet<String> {
            let operands = l.operands.iter().filter(|t| matches!(t, Term::Value(_))).map(Term::sigil);
            operands.chain(l.results.iter().map(|r| format!("%{r}"))).collect()
        };
        let Some((last, mut rest)) = self.lines.split_last().map(|(l, r)| (l, r.iter().collect::<Vec<_>>())) else {
            return Err("`match` is empty".into());
        };
        let mut known = names(last);
        while let Some(i) = rest.iter().position(|l| !names(l).is_disjoint(&known)) {
            known.extend(names(rest.remove(i)));
        }
        match rest.first() {
            Some(line) => Err(format!("`{}` shares no value with the other lines", line.text)),
            None => Ok(()),
        }
    }

    /// The lines that `results` need, in order.
    fn body(&self, results: &[String]) -> Vec<usize> {
        let mut needed: BTreeSet<&str> = results.iter().map(String::as_str).collect();
        let mut body = BTreeSet::new();
        // Lines need not be in order of definition: to a fixpoint.
        loop {
            let new = (0..self.lines.len())
                .find(|i| !body.contains(i) && self.lines[*i].results.iter().any(|r| needed.contains(r.as_str())));
            let Some(i) = new else { return body.into_iter().collect() };
            body.insert(i);
            needed.extend(self.lines[i].operands.iter().filter_map(|t| match t {
                Term::Value(name) => Some(name.as_str()),
                Term::Weight { .. } => None,
            }));
        }
    }

    /// The names that these lines use but do not define, with sigils.
    fn captures(&self, body: &[usize]) -> BTreeSet<String> {
        let lines = || body.iter().map(|i| &self.lines[*i]);
        let defined: BTreeSet<String> = lines().flat_map(|l| l.results.iter().map(|r| format!("%{r}"))).collect();
        let used = lines().flat_map(|l| l.operands.iter().map(Term::sigil));
        used.filter(|n| !defined.contains(n)).collect()
    }

    /// Why a guard does not hold, or `None` if all do.
    fn refused(&self, found: &Match, region: &Region, uses: &Uses) -> Option<String> {
        let value = |name: &String| found.values.get(name).copied();
        self.guards.iter().find_map(|guard| match guard {
            Guard::SingleUse(name) => {
                let v = value(name)?;
                let n = uses.count(v);
                (n != 1).then(|| format!("%{} has {n} uses, it must have one", region.value(v).name))
            }
            Guard::Without(name, key) => {
                let v = region.value(value(name)?);
                let Def::Result(node, _) = v.def else { return None };
                let op = &region.node(node).op;
                op.attributes().contains_key(key).then(|| format!("%{} is a {} with `{key}`", v.name, op.mnemonic()))
            }
            Guard::Holds(text) => match holds(text, &Matched { found, region }) {
                Ok(true) => None,
                Ok(false) => Some(format!("`{text}` does not hold")),
                Err(why) => Some(why.to_string()),
            },
            Guard::SameType(a, b) => {
                let (a, b) = (region.value(value(a)?), region.value(value(b)?));
                (a.ty != b.ty)
                    .then(|| format!("%{} is {} and %{} is {}, they must be equal", a.name, a.ty, b.name, b.ty))
            }
        })
    }

    /// Why an op of `produce` cannot be made, or `None` if all can.
    fn unmade(&self, found: &Match, region: &Region) -> Option<String> {
        let Produce::Replace { ops, .. } = &self.produce else { return None };
        ops.iter().find_map(|(line, make)| make.op(line, &Matched { found, region }).err())
    }

    /// The patch for a match; `None` if a name is not bound after all.
    fn patch(&self, found: &Match, region: &Region) -> Option<Patch> {
        match &self.produce {
            Produce::Outline { kernel, operands, results } => {
                let nodes =
                    self.body(results).into_iter().map(|i| found.nodes.get(i).copied()).collect::<Option<_>>()?;
                let mut inputs = Vec::new();
                for term in operands {
                    match term {
                        Term::Value(name) => {
                            inputs.push((name.as_str().into(), Operand::Value(*found.values.get(name)?)))
                        }
                        Term::Weight { name, .. } => {
                            if let Some(w) = found.weights.get(name)? {
                                inputs.push((name.as_str().into(), Operand::Weight(*w)));
                            }
                        }
                    }
                }
                let results = results.iter().map(|r| found.values.get(r).copied()).collect::<Option<_>>()?;
                Some(Patch::Outline(Outline { kernel: kernel.as_str().into(), nodes, operands: inputs, results }))
            }
            Produce::Replace { ops, aliases } => self.replacement(found, region, ops, aliases).map(Patch::Replace),
        }
    }

    fn replacement(
        &self,
        found: &Match,
        region: &Region,
        ops: &[(Line, Make)],
        aliases: &[(String, String)],
    ) -> Option<Replace> {
        let mut replace = Replace { nodes: found.nodes.clone(), ops: Vec::new(), swaps: Vec::new() };
        // Names that `produce` defines hide those that `match` bound.
        let mut made: Vec<(&str, Input)> = Vec::new();
        let is_matched = |name: &str| self.lines.iter().any(|l| l.results.iter().any(|r| r == name));
        let value = |made: &[(&str, Input)], name: &str| {
            let new = made.iter().rev().find(|(n, _)| *n == name).map(|(_, input)| *input);
            new.or_else(|| Some(Input::Old(Operand::Value(*found.values.get(name)?))))
        };
        for (line, make) in ops {
            let op = make.op(line, &Matched { found, region }).ok()?;
            let mut operands = Vec::new();
            for term in &line.operands {
                match term {
                    Term::Value(name) => operands.push(value(&made, name)?),
                    Term::Weight { name, .. } => {
                        operands.extend(found.weights.get(name)?.map(|w| Input::Old(Operand::Weight(w))))
                    }
                }
            }
            for (i, result) in line.results.iter().enumerate() {
                let new = Input::New { op: replace.ops.len(), result: i };
                made.push((result, new));
                if is_matched(result) {
                    replace.swaps.push((*found.values.get(result)?, new));
                }
            }
            let names = line.results.iter().map(|r| r.as_str().into()).collect();
            replace.ops.push(NewOp { op, operands, names });
        }
        for (old, new) in aliases {
            let old: ValueId = *found.values.get(old)?;
            replace.swaps.push((old, value(&made, new)?));
        }
        Some(replace)
    }
}

impl Rewrite for Rule {
    fn name(&self) -> &str {
        &self.name
    }

    fn find(&self, region: &Region, uses: &Uses, root: NodeId) -> Found {
        match matcher::find(&self.lines, region, uses, root) {
            Ok(found) => match self.refused(&found, region, uses).or_else(|| self.unmade(&found, region)) {
                Some(why) => Found::Near(why),
                None => self.patch(&found, region).map_or(Found::Nothing, Found::Patch),
            },
            // All lines but one: near enough to be worth a word.
            Err(miss) if miss.found > 0 && miss.found + 1 >= self.lines.len() => Found::Near(miss.why),
            Err(_) => Found::Nothing,
        }
    }
}
