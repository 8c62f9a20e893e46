//! Weight expressions in the text: `quant(cat.0($q, mul.1("k_proj.weight", #s0)))`.
//!
//! A term is written inside the term that uses it when its type follows from there ([`below`]); otherwise it has a
//! line of its own.

use crate::diag::Span;
use crate::id::{DataId, WeightId};
use crate::region::Region;
use crate::ty::{Dim, Elem, Group, Layout, Name, Quant, Type};
use crate::weight::{DataMap, DataRef, WeightExpr};

use super::cursor::{Cursor, DEPTH, Fail, Parsed};
use super::expr::{Expr, RESERVED, plain};
use super::lex::{Tok, shorten};
use super::scope::Scope;

/// What a term says about the type of a term right below it.
pub(crate) struct Hint {
    /// The element type.
    pub(crate) elem: Option<Elem>,
    /// The shape, where the outer term keeps it.
    pub(crate) shape: Option<Vec<Dim>>,
}

/// The type that a nested term has below `expr`, itself of element `elem` and shape `shape`.
pub(crate) fn below(expr: &WeightExpr, elem: Option<Elem>, shape: Option<&[Dim]>, dtype: Elem) -> Hint {
    let kept = shape.map(<[Dim]>::to_vec);
    match expr {
        WeightExpr::Source(_) | WeightExpr::Packed { .. } | WeightExpr::Param(_) => Hint { elem: None, shape: None },
        WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Clip { .. }
        | WeightExpr::Pack(_) => Hint { elem, shape: kept },
        WeightExpr::Quant(_) | WeightExpr::Codes { .. } => Hint { elem: Some(dtype), shape: kept },
        WeightExpr::Transpose(_) => Hint { elem, shape: kept.map(|s| s.into_iter().rev().collect()) },
        WeightExpr::Cat { .. } | WeightExpr::Rows { .. } => Hint { elem, shape: None },
        WeightExpr::Stack(_) => Hint { elem, shape: kept.map(|s| s.into_iter().skip(1).collect()) },
    }
}

/// A term that was read but not yet built.
#[derive(Clone, Debug)]
pub(super) struct Term<'t> {
    kind: Kind<'t>,
    pub(super) span: Span,
}

#[derive(Clone, Debug)]
enum Kind<'t> {
    Ref(&'t str),
    Source { alternatives: Vec<(&'t str, Span)>, optional: bool },
    Packed { layout: Layout, tensor: &'t str },
    Scaled { divide: bool, axis: usize, of: Box<Term<'t>>, by: Factors<'t> },
    Offset(Box<Term<'t>>, Expr<'t>),
    Cat(usize, Vec<Term<'t>>),
    Stack(Vec<Term<'t>>),
    Count { name: &'t str, from: Expr<'t>, to: Expr<'t>, of: Box<Term<'t>> },
    Rows(Box<Term<'t>>, Expr<'t>, Expr<'t>),
    Transpose(Box<Term<'t>>),
    Clip { of: Box<Term<'t>>, lo: (&'t str, Span), hi: (&'t str, Span), group: Group },
    Quant(Box<Term<'t>>),
    Codes { of: Box<Term<'t>>, codes: (&'t str, Span), scales: (&'t str, Span), zeros: (&'t str, Span) },
    Pack(Box<Term<'t>>),
    Choice(Expr<'t>, Box<[Term<'t>; 2]>),
}

#[derive(Clone, Debug)]
enum Factors<'t> {
    Whole(&'t str, Span),
    Tie(&'t str, Span, Expr<'t>, Expr<'t>),
    Within(&'t str, Span, Expr<'t>, Expr<'t>),
}

fn data<'t>(c: &mut Cursor<'t>) -> Parsed<(&'t str, Span)> {
    match c.peek() {
        Tok::Data(name) => Ok((name, c.next().1)),
        _ => Err(c.expected("a data entry such as #s0")),
    }
}

fn factors<'t>(c: &mut Cursor<'t>) -> Parsed<Factors<'t>> {
    let tie = c.is_word("tie");
    if !tie && !c.is_word("within") {
        return data(c).map(|(name, span)| Factors::Whole(name, span));
    }
    c.next();
    c.expect("(")?;
    let (name, span) = data(c)?;
    c.expect(",")?;
    let a = Expr::parse(c)?;
    c.expect(",")?;
    let b = Expr::parse(c)?;
    c.expect(")")?;
    Ok(if tie { Factors::Tie(name, span, a, b) } else { Factors::Within(name, span, a, b) })
}

impl<'t> Term<'t> {
    pub(super) fn parse(c: &mut Cursor<'t>) -> Parsed<Self> {
        c.nested(|c| {
            let start = c.span();
            let kind = Self::kind(c)?;
            Ok(Self { kind, span: start.to(c.before()) })
        })
    }

    fn kind(c: &mut Cursor<'t>) -> Parsed<Kind<'t>> {
        let (tok, span) = (c.peek(), c.span());
        let word = match tok {
            Tok::Weight(name) => {
                c.next();
                return Ok(Kind::Ref(name));
            }
            Tok::Str(_) => return Self::source(c),
            Tok::Word(word) => word,
            Tok::Int(_) | Tok::Float(_) | Tok::Value(_) | Tok::Data(_) | Tok::At(_) | Tok::Punct(_) | Tok::End => {
                return Err(c.expected("a weight expression"));
            }
        };
        c.next();
        if word == "if" {
            let condition = Expr::parse(c)?;
            c.expect_word("then")?;
            let yes = Self::parse(c)?;
            c.expect_word("else")?;
            let no = Self::parse(c)?;
            return Ok(Kind::Choice(condition, Box::new([yes, no])));
        }
        let axis = |c: &mut Cursor<'t>| {
            c.expect(".")?;
            let at = c.span();
            usize::try_from(c.int("an axis")?).map_err(|_| Fail::syntax(at, "there is no such axis"))
        };
        let one = |c: &mut Cursor<'t>| Self::parse(c).map(Box::new);
        let kind = match word {
            "mul" | "div" => {
                let axis = axis(c)?;
                c.expect("(")?;
                let of = one(c)?;
                c.expect(",")?;
                Kind::Scaled { divide: word == "div", axis, of, by: factors(c)? }
            }
            "cat" => {
                let axis = axis(c)?;
                c.expect("(")?;
                return Ok(Kind::Cat(axis, c.list(")", Self::parse)?));
            }
            "stack" => {
                c.expect("(")?;
                let (Tok::Word(name), Tok::Word("in")) = (c.peek(), c.ahead(1)) else {
                    return Ok(Kind::Stack(c.list(")", Self::parse)?));
                };
                if RESERVED.contains(&name) {
                    return Err(Fail::name(c.span(), format!("`{name}` is a word of the language")));
                }
                c.next();
                c.expect_word("in")?;
                let from = Expr::parse(c)?;
                c.expect("..")?;
                let to = Expr::parse(c)?;
                c.expect(",")?;
                Kind::Count { name, from, to, of: one(c)? }
            }
            "packed" => {
                c.expect(".")?;
                let (layout, at) = c.word("a layout")?;
                let layout = layout.parse().map_err(|e: String| Fail::ty(at, e))?;
                c.expect("(")?;
                Kind::Packed { layout, tensor: c.string("the stem of a tensor's name")?.0 }
            }
            "offset" | "rows" | "transpose" | "clip" | "codes" | "quant" | "pack" => {
                c.expect("(")?;
                let of = one(c)?;
                match word {
                    "offset" => {
                        c.expect(",")?;
                        Kind::Offset(of, Expr::parse(c)?)
                    }
                    "rows" => {
                        c.expect(",")?;
                        let start = Expr::parse(c)?;
                        c.expect(",")?;
                        Kind::Rows(of, start, Expr::parse(c)?)
                    }
                    "clip" => {
                        c.expect(",")?;
                        let lo = data(c)?;
                        c.expect(",")?;
                        let hi = data(c)?;
                        c.expect(",")?;
                        let (word, at) = c.word("a group such as g128 or row")?;
                        let group = format!("u4{word}")
                            .parse::<Quant>()
                            .map_err(|_| Fail::syntax(at, "a group is g128, g64, … or row"))?;
                        Kind::Clip { of, lo, hi, group: group.group }
                    }
                    "codes" => {
                        let mut entry = || {
                            c.expect(",")?;
                            data(c)
                        };
                        Kind::Codes { of, codes: entry()?, scales: entry()?, zeros: entry()? }
                    }
                    "transpose" => Kind::Transpose(of),
                    "quant" => Kind::Quant(of),
                    _ => Kind::Pack(of),
                }
            }
            other => {
                let known = "mul, div, offset, cat, stack, rows, transpose, clip, quant, codes, pack, packed";
                return Err(Fail::syntax(span, format!("`{}` is not a weight expression", shorten(other)))
                    .note(format!("known: {known}")));
            }
        };
        c.expect(")")?;
        Ok(kind)
    }

    fn source(c: &mut Cursor<'t>) -> Parsed<Kind<'t>> {
        let mut alternatives = vec![c.string("a tensor's name")?];
        while c.eat_word("or") {
            alternatives.push(c.string("a tensor's name")?);
        }
        Ok(Kind::Source { alternatives, optional: c.eat("?") })
    }
}

/// What a name of a weight stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Bound {
    /// A weight of the region.
    Weight(WeightId),
    /// An optional tensor that the checkpoint lacks.
    Absent(String),
}

/// Builds the terms of one region.
pub(super) struct Terms<'a, 'e> {
    pub(super) region: &'a mut Region,
    pub(super) scope: &'a Scope<'e>,
    pub(super) dtype: Elem,
    /// What `$name` stands for.
    pub(super) weight: &'a dyn Fn(&str) -> Option<Bound>,
    /// What `#name` stands for.
    pub(super) data: &'a dyn Fn(&str) -> Option<DataId>,
    /// How deep each weight's term nests.
    pub(super) depth: &'a mut Vec<usize>,
}

/// What is known of a term before it is built.
#[derive(Clone, Default)]
pub(super) struct Want {
    pub(super) name: Option<Name>,
    pub(super) elem: Option<Elem>,
    pub(super) shape: Option<Vec<Dim>>,
    pub(super) layout: Option<Layout>,
    /// Whether there is a type on the line.
    pub(super) typed: bool,
}

impl Terms<'_, '_> {
    fn data(&self, (name, span): (&str, Span)) -> Parsed<DataId> {
        (self.data)(name).ok_or_else(|| Fail::name(span, format!("#{} is not defined here", shorten(name))))
    }

    fn by(&self, by: &Factors<'_>) -> Parsed<DataRef> {
        let (id, map) = match by {
            Factors::Whole(name, span) => (self.data((name, *span))?, DataMap::Whole),
            Factors::Tie(name, span, a, b) => {
                (self.data((name, *span))?, DataMap::Tie { width: self.scope.whole(a)?, times: self.scope.whole(b)? })
            }
            Factors::Within(name, span, a, b) => (
                self.data((name, *span))?,
                DataMap::Within { start: self.scope.whole(a)?, total: self.scope.whole(b)? },
            ),
        };
        Ok(DataRef { id, map })
    }

    /// The tensor of a source: the first alternative that the checkpoint has.
    fn tensor(&self, alternatives: &[(&str, Span)], optional: bool) -> Parsed<Result<String, String>> {
        let names = alternatives.iter().map(|(raw, span)| self.scope.text(raw, *span)).collect::<Parsed<Vec<_>>>()?;
        let first = names.first().cloned().unwrap_or_default();
        if names.len() < 2 && !optional {
            return Ok(Ok(first));
        }
        let has = |name: &String| self.scope.env.tensor(&self.region.tensor_name(name));
        Ok(match names.into_iter().find(has) {
            Some(name) => Ok(name),
            None if optional => Err(self.region.tensor_name(&first)),
            None => Ok(first),
        })
    }

    /// Builds `term`; an optional tensor that is missing makes the whole term absent.
    pub(super) fn build(&mut self, term: &Term<'_>, want: Want) -> Parsed<Bound> {
        let span = term.span;
        let dummy = WeightId::new(0);
        let mut count = None;
        // The shell of the expression first: what it says about the terms below does not depend on them.
        let (shell, below_terms): (WeightExpr, Vec<&Term<'_>>) = match &term.kind {
            Kind::Ref(name) => {
                let found = (self.weight)(name);
                return found.ok_or_else(|| Fail::name(span, format!("${} is not defined here", shorten(name))));
            }
            Kind::Choice(condition, parts) => {
                let [yes, no] = parts.as_ref();
                return self.build(if self.scope.truth(condition)? { yes } else { no }, want);
            }
            Kind::Source { alternatives, optional } => match self.tensor(alternatives, *optional)? {
                Ok(name) => (WeightExpr::Source(name.into()), Vec::new()),
                Err(missing) => return Ok(Bound::Absent(missing)),
            },
            Kind::Packed { layout, tensor } => {
                let tensor = self.scope.text(tensor, span)?.into();
                (WeightExpr::Packed { tensor, layout: *layout }, Vec::new())
            }
            Kind::Scaled { divide, axis, of, by } => {
                let (axis, of_, by) = (*axis, dummy, self.by(by)?);
                let expr =
                    if *divide { WeightExpr::Div { axis, of: of_, by } } else { WeightExpr::Mul { axis, of: of_, by } };
                (expr, vec![of])
            }
            Kind::Offset(of, by) => {
                let value = self.scope.eval(by)?;
                let Some(by) = value.as_f64() else { return Err(Fail::value(by.span, "a number is needed here")) };
                (WeightExpr::Offset { of: dummy, by }, vec![of])
            }
            Kind::Cat(axis, parts) => {
                (WeightExpr::Cat { axis: *axis, parts: vec![dummy; parts.len()] }, parts.iter().collect())
            }
            Kind::Stack(parts) => (WeightExpr::Stack(vec![dummy; parts.len()]), parts.iter().collect()),
            Kind::Count { name, from, to, of } => {
                let (from, to) = (self.scope.whole(from)?, self.scope.whole(to)?);
                let len = to.saturating_sub(from);
                self.scope.spend(len, span)?;
                count = Some((*name, from));
                (WeightExpr::Stack(vec![dummy; len as usize]), vec![of; len as usize])
            }
            Kind::Rows(of, start, len) => {
                (WeightExpr::Rows { of: dummy, start: self.scope.whole(start)?, len: self.scope.whole(len)? }, vec![of])
            }
            Kind::Transpose(of) => (WeightExpr::Transpose(dummy), vec![of]),
            Kind::Clip { of, lo, hi, group } => {
                (WeightExpr::Clip { of: dummy, lo: self.data(*lo)?, hi: self.data(*hi)?, group: *group }, vec![of])
            }
            Kind::Quant(of) => (WeightExpr::Quant(dummy), vec![of]),
            Kind::Codes { of, codes, scales, zeros } => {
                let (codes, scales, zeros) = (self.data(*codes)?, self.data(*scales)?, self.data(*zeros)?);
                (WeightExpr::Codes { of: dummy, codes, scales, zeros }, vec![of])
            }
            Kind::Pack(of) => (WeightExpr::Pack(dummy), vec![of]),
        };
        let hint = below(&shell, want.elem, want.shape.as_deref(), self.dtype);
        let mut children = Vec::with_capacity(below_terms.len());
        let mut absent = None;
        for (k, child) in below_terms.iter().enumerate() {
            let want = Want { name: None, elem: hint.elem, shape: hint.shape.clone(), layout: None, typed: false };
            let built = match count {
                Some((name, from)) => self.scope.counting(name, from + k as u64, || self.build(child, want)),
                None => self.build(child, want),
            };
            match built? {
                Bound::Weight(id) => children.push(id),
                Bound::Absent(name) => absent = Some(name),
            }
        }
        match absent {
            Some(name) if children.is_empty() => return Ok(Bound::Absent(name)),
            Some(name) => {
                return Err(Fail::value(span, format!("the checkpoint has no `{name}`, but other parts of this")));
            }
            None => {}
        }
        let mut replaced = children.iter().copied();
        let expr = shell.map_children(|old| replaced.next().unwrap_or(old));
        let ty = self.infer(&expr, &children, want.clone(), span)?;
        let depth = 1 + children.iter().filter_map(|c| self.depth.get(c.index())).max().copied().unwrap_or(0);
        if depth > DEPTH {
            return Err(Fail::limit(span, format!("weight expressions nest at most {DEPTH} deep")));
        }
        let id = self.region.add_weight(want.name, expr, ty);
        self.depth.resize(id.index(), 0);
        self.depth.push(depth);
        Ok(Bound::Weight(id))
    }

    fn infer(&self, expr: &WeightExpr, children: &[WeightId], want: Want, span: Span) -> Parsed<Type> {
        let region = &*self.region;
        let inferred = expr
            .infer_shape(|w| region.weight(w).ty.clone(), |d| region.data(d).shape.clone())
            .map_err(|m| Fail::ty(span, m))?;
        let elem = want.elem.or_else(|| match expr {
            WeightExpr::Quant(_) | WeightExpr::Codes { .. } => None,
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Offset { .. }
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Clip { .. }
            | WeightExpr::Pack(_) => children.first().map(|c| region.weight(*c).ty.elem),
        });
        let own_line =
            "the type of this does not follow from where it stands: give it a line of its own, `$name = … : type`";
        let Some(elem) = elem else { return Err(Fail::ty(span, own_line)) };
        let shape = match (inferred, want.shape) {
            (Some(found), Some(said)) if found != said => {
                let (found, said) = (Type::new(elem, found), Type::new(elem, said));
                return Err(Fail::ty(span, format!("this is {found}, {said} is needed")));
            }
            (Some(shape), _) | (None, Some(shape)) => shape,
            (None, None) => return Err(Fail::ty(span, own_line)),
        };
        let layout = match expr {
            WeightExpr::Packed { layout, .. } if !want.typed => Some(*layout),
            WeightExpr::Pack(_) if want.layout.is_none() => {
                return Err(Fail::ty(span, "the type of pack names a layout: `: u4g128@rows[…]`"));
            }
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
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
            | WeightExpr::Pack(_) => want.layout,
        };
        Ok(Type { elem, layout, shape })
    }
}

/// The stem of a name that must hold no `{name}`.
pub(super) fn label(raw: &str, span: Span) -> Parsed<String> {
    plain(raw, span)
}
