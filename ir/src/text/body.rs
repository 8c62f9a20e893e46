//! The lines of a region, built one by one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value as Json};

use crate::diag::Span;
use crate::id::{DataId, ValueId};
use crate::module::FusedDef;
use crate::op::{Fused, Op, Operand, Slot};
use crate::region::{Data, Def, Region, Uses};
use crate::ty::{Dim, Elem, Name, Type};

use super::cursor::{Cursor, Fail, Parsed};
use super::lex::{Tok, shorten};
use super::line::{Arg, Callee, Line, Named, NodeLine, Target};
use super::scope::{Scope, show};
use super::term::{Bound, Term, Terms, Want, label};
use super::types::TypeText;

/// The longest constant axis; products of two fit into 64 bits.
pub(crate) const LONGEST: u64 = 1 << 31;

/// What a line adds to the size of the expanded text besides its characters.
const LINE: u64 = 64;

/// What a body is read against.
pub(super) struct Context<'a, 'e> {
    pub(super) scope: &'a mut Scope<'e>,
    pub(super) dtype: Elem,
    pub(super) dims: &'a [Name],
    pub(super) fused: &'a [FusedDef],
}

/// A region under construction.
pub(super) struct Body<'t> {
    pub(super) region: Region,
    values: BTreeMap<&'t str, ValueId>,
    weights: BTreeMap<&'t str, Bound>,
    data: BTreeMap<&'t str, DataId>,
    depth: Vec<usize>,
    /// Values that a compile-time choice did not take.
    passed_over: Vec<ValueId>,
}

fn taken(sigil: char, (name, span): Named<'_>) -> Fail {
    Fail::name(span, format!("{sigil}{} is defined already", shorten(name)))
}

fn check_dims(ty: &Type, span: Span) -> Parsed<()> {
    let long = ty.shape.iter().filter_map(Dim::as_const).find(|n| *n > LONGEST);
    long.map_or(Ok(()), |n| Err(Fail::limit(span, format!("an axis of {n}: at most {LONGEST} are possible"))))
}

impl<'t> Body<'t> {
    pub(super) fn new(region: Region) -> Self {
        Self {
            region,
            values: BTreeMap::new(),
            weights: BTreeMap::new(),
            data: BTreeMap::new(),
            depth: Vec::new(),
            passed_over: Vec::new(),
        }
    }

    fn resolve(ty: &TypeText<'t>, cx: &Context<'_, '_>) -> Parsed<Type> {
        let found = ty.resolve(cx.scope, cx.dtype, cx.dims)?;
        check_dims(&found, ty.span)?;
        Ok(found)
    }

    /// Adds a parameter.
    pub(super) fn param(&mut self, arg: Arg<'t>, ty: &TypeText<'t>, cx: &Context<'_, '_>) -> Parsed<()> {
        let ty = Self::resolve(ty, cx)?;
        match arg {
            Arg::Value(name, span) => {
                let id = self.region.add_param(name, ty);
                self.name((name, span), id)
            }
            Arg::Weight(name, span) => {
                let id = self.region.add_weight_param(name, ty);
                self.depth.push(1);
                self.name_weight((name, span), Bound::Weight(id))
            }
        }
    }

    fn name(&mut self, name: Named<'t>, id: ValueId) -> Parsed<()> {
        self.values.insert(name.0, id).map_or(Ok(()), |_| Err(taken('%', name)))
    }

    fn name_weight(&mut self, name: Named<'t>, bound: Bound) -> Parsed<()> {
        self.weights.insert(name.0, bound).map_or(Ok(()), |_| Err(taken('$', name)))
    }

    fn value(&self, (name, span): Named<'_>) -> Parsed<ValueId> {
        self.values
            .get(name)
            .copied()
            .ok_or_else(|| Fail::name(span, format!("%{} is not defined here", shorten(name))))
    }

    /// Reads lines up to and with the closing brace.
    pub(super) fn read(mut self, c: &mut Cursor<'t>, cx: &mut Context<'_, '_>) -> Parsed<Region> {
        loop {
            cx.scope.spend(LINE, c.span())?;
            match Line::parse(c)? {
                Line::Let => cx.scope.bindings(c)?,
                Line::Require => cx.scope.require(c)?,
                Line::Return(results) => {
                    let ids = results.iter().map(|r| self.value(*r)).collect::<Parsed<Vec<_>>>()?;
                    self.region.set_results(ids);
                    c.expect("}")?;
                    self.prune();
                    return Ok(self.region);
                }
                Line::Node(line) => self.node(&line, cx)?,
                Line::Alias { name, to, types } => {
                    let id = self.target(&to, cx)?;
                    self.check_types(&types, &[id], name.1, cx)?;
                    self.name(name, id)?;
                }
                Line::Weight { name, term, ty } => self.weight(name, &term, ty.as_ref(), cx)?,
                Line::Data { name, label: (raw, span), ty } => {
                    let at = ty.span;
                    let ty = Self::resolve(&ty, cx)?;
                    let shape: Option<Vec<u64>> = ty.shape.iter().map(Dim::as_const).collect();
                    let fits = |s: &Vec<u64>| s.iter().try_fold(1u64, |a, b| a.checked_mul(*b)).is_some();
                    let (Elem::F32, None, Some(shape)) = (ty.elem, ty.layout, shape.filter(fits)) else {
                        return Err(Fail::ty(at, format!("data has a type such as f32[4096], not {ty}")));
                    };
                    let data = Data { name: name.0.into(), label: label(raw, span)?.into(), shape, values: None };
                    let id = self.region.add_data(data);
                    self.data.insert(name.0, id).map_or(Ok(()), |_| Err(taken('#', name)))?;
                }
            }
        }
    }

    fn target(&mut self, to: &Target<'t>, cx: &Context<'_, '_>) -> Parsed<ValueId> {
        match to {
            Target::Value(name) => self.value(*name),
            Target::Choice(condition, parts) => {
                let [yes, no] = parts.as_ref();
                let (yes, no) = if cx.scope.truth(condition)? { (yes, no) } else { (no, yes) };
                let (taken, other) = (self.target(yes, cx)?, self.target(no, cx)?);
                self.passed_over.push(other);
                Ok(taken)
            }
        }
    }

    fn weight(
        &mut self,
        name: Named<'t>,
        term: &Term<'t>,
        ty: Option<&TypeText<'t>>,
        cx: &Context<'_, '_>,
    ) -> Parsed<()> {
        let ty = ty.map(|ty| Self::resolve(ty, cx)).transpose()?;
        let mut want = Want { name: Some(name.0.into()), ..Want::default() };
        if let Some(ty) = ty.clone() {
            want.elem = Some(ty.elem);
            want.layout = ty.layout;
            want.shape = Some(ty.shape);
            want.typed = true;
        }
        let (weights, data) = (&self.weights, &self.data);
        let mut terms = Terms {
            region: &mut self.region,
            scope: cx.scope,
            dtype: cx.dtype,
            weight: &|n| weights.get(n).cloned(),
            data: &|n| data.get(n).copied(),
            depth: &mut self.depth,
        };
        let bound = terms.build(term, want)?;
        if let (Bound::Weight(id), Some(ty)) = (&bound, &ty)
            && self.region.weight(*id).ty != *ty
        {
            return Err(Fail::ty(term.span, format!("this is {}, {ty} is written", self.region.weight(*id).ty)));
        }
        if let Bound::Weight(id) = &bound {
            check_dims(&self.region.weight(*id).ty, term.span)?;
        }
        self.name_weight(name, bound)
    }

    fn node(&mut self, line: &NodeLine<'t>, cx: &Context<'_, '_>) -> Parsed<()> {
        let op = op(line, cx.scope)?;
        let Some(operands) = self.operands(line, &op, cx)? else { return Ok(()) };
        let names: Vec<&str> = line.results.iter().map(|(n, _)| *n).collect();
        let id = self.region.append(op, operands, &names, cx.fused).map_err(|e| Fail::ty(line.span, e.0))?;
        let results = self.region.node(id).results.clone();
        if results.len() != names.len() {
            let (have, want) = (names.len(), results.len());
            return Err(Fail::ty(line.span, format!("this has {want} results, {have} names are given")));
        }
        for id in &results {
            check_dims(&self.region.value(*id).ty, line.span)?;
        }
        self.check_types(&line.types, &results, line.span, cx)?;
        line.results.iter().zip(results).try_for_each(|(name, id)| self.name(*name, id))
    }

    /// The operands of a line; `None` if the line came down to another name for its first operand.
    fn operands(&mut self, line: &NodeLine<'t>, op: &Op, cx: &Context<'_, '_>) -> Parsed<Option<Vec<Operand>>> {
        let mut operands = Vec::with_capacity(line.args.len());
        let mut missing: Option<(usize, Span, String)> = None;
        for (i, arg) in line.args.iter().enumerate() {
            let operand = match *arg {
                Arg::Value(name, span) => Operand::Value(self.value((name, span))?),
                Arg::Weight(name, span) => match self.weights.get(name) {
                    Some(Bound::Weight(id)) => Operand::Weight(*id),
                    Some(Bound::Absent(tensor)) => {
                        missing.get_or_insert((i, span, tensor.clone()));
                        continue;
                    }
                    None => return Err(Fail::name(span, format!("${} is not defined here", shorten(name)))),
                },
            };
            if let (Some((_, at, tensor)), false) = (&missing, line.optional) {
                let message = format!("the checkpoint has no `{tensor}`, but the operand after it");
                return Err(Fail::value(*at, message));
            }
            operands.push(operand);
        }
        let Some((at, span, tensor)) = missing else { return Ok(Some(operands)) };
        if line.optional {
            let (Some(Operand::Value(id)), [name]) = (operands.first(), line.results.as_slice()) else {
                return Err(Fail::syntax(line.span, "an `opt` line has one result, and a value as its first operand"));
            };
            let id = *id;
            self.check_types(&line.types, &[id], line.span, cx)?;
            self.name(*name, id)?;
            return Ok(None);
        }
        match op.slots().get(at) {
            Some(Slot::OptWeight) => Ok(Some(operands)),
            Some(Slot::Value | Slot::Values | Slot::Weight | Slot::Signature) | None => {
                let message = format!("the checkpoint has no `{tensor}`, which {} needs", op.mnemonic());
                Err(Fail::value(span, message).note("a line that is left out without its weight starts with `opt`"))
            }
        }
    }

    fn check_types(&self, types: &[TypeText<'t>], results: &[ValueId], span: Span, cx: &Context<'_, '_>) -> Parsed<()> {
        if types.is_empty() {
            return Ok(());
        }
        if types.len() != results.len() {
            let message = format!("{} types are written for {} results", types.len(), results.len());
            return Err(Fail::ty(span, message));
        }
        for (text, id) in types.iter().zip(results) {
            let (said, found) = (Self::resolve(text, cx)?, &self.region.value(*id).ty);
            if said != *found {
                return Err(Fail::ty(text.span, format!("the type of this result is {found}, {said} is written")));
            }
        }
        Ok(())
    }

    /// Drops the nodes that compile-time choices passed over and that nothing else uses.
    fn prune(&mut self) {
        let mut open = std::mem::take(&mut self.passed_over);
        if open.is_empty() {
            return;
        }
        let uses = Uses::of(&self.region);
        let mut left: Vec<usize> = self.region.value_ids().map(|v| uses.count(v)).collect();
        let mut dead = BTreeSet::new();
        while let Some(value) = open.pop() {
            let Def::Result(id, _) = self.region.value(value).def else { continue };
            let node = self.region.node(id);
            let unused = node.results.iter().all(|r| left.get(r.index()).is_none_or(|n| *n == 0));
            if unused && dead.insert(id) {
                for value in node.operands.iter().filter_map(|o| o.value()) {
                    if let Some(n) = left.get_mut(value.index()) {
                        *n = n.saturating_sub(1);
                    }
                    open.push(value);
                }
            }
        }
        if !dead.is_empty() {
            self.region.remove_all(&dead);
            self.region.compact();
        }
    }
}

/// The op of a line with its attributes.
fn op(line: &NodeLine<'_>, scope: &Scope<'_>) -> Parsed<Op> {
    let written = scope.attributes(&line.attributes)?;
    let (mnemonic, mut map) = match &line.callee {
        Callee::Op(word) => ((*word).to_owned(), Map::new()),
        Callee::Fused(name) => {
            if !written.is_empty() {
                return Err(Fail::ty(line.span, "a fused call has no attributes: they stand in its definition"));
            }
            return Ok(Fused { callee: (*name).into() }.into());
        }
        Callee::Chosen(e) => match scope.eval(e)? {
            Json::String(text) => chosen(&text, scope).map_err(|f| Fail { span: e.span, ..f })?,
            other => return Err(Fail::value(e.span, format!("an op is needed here, this is {}", show(&other)))),
        },
    };
    map.extend(written);
    // A flag that is false is a flag that is not there.
    map.retain(|_, v| *v != Json::Bool(false));
    if mnemonic == "fused" || !Op::MNEMONICS.contains(&mnemonic.as_str()) {
        return Err(Fail::name(line.span, format!("`{}` is not an op", shorten(&mnemonic)))
            .note(format!("known: {}", Op::MNEMONICS.join(", "))));
    }
    Op::from_attributes(&mnemonic, map).map_err(|e| {
        let fail = Fail::ty(line.span, e.0);
        let mut words = line.attributes.iter().filter_map(|f| f.value.as_ref()?.as_word());
        match words.find(|w| !scope.knows(w)) {
            Some(word) => fail.note(format!("`{}` has no value here, so it was read as a word", shorten(word))),
            None => fail,
        }
    })
}

/// An op that a string names: `"gelu {form=tanh}"`.
fn chosen(text: &str, scope: &Scope<'_>) -> Parsed<(String, Map<String, Json>)> {
    let mut c = Cursor::new(text)?;
    let (mnemonic, _) = c.word("an op")?;
    let fields = if c.eat("{") { super::expr::fields(&mut c, "}")? } else { Vec::new() };
    match c.peek() {
        Tok::End => Ok((mnemonic.to_owned(), scope.attributes(&fields)?)),
        _ => Err(c.expected("the end of the op")),
    }
}
