//! One line of a region: `%a, %b = op %x, $w {key=value} : type, type`, read but not yet built.

use crate::diag::Span;

use super::cursor::{Cursor, Fail, Parsed};
use super::expr::{Expr, Field, fields};
use super::lex::Tok;
use super::term::Term;
use super::types::TypeText;

/// A name with its place.
pub(super) type Named<'t> = (&'t str, Span);

/// What a node line applies.
#[derive(Clone, Debug)]
pub(super) enum Callee<'t> {
    /// `silu`.
    Op(&'t str),
    /// `fused @name`.
    Fused(&'t str),
    /// `(act)`: a string such as `"gelu {form=tanh}"`.
    Chosen(Expr<'t>),
}

/// An operand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg<'t> {
    /// `%name`.
    Value(&'t str, Span),
    /// `$name`.
    Weight(&'t str, Span),
}

/// A node line.
#[derive(Clone, Debug)]
pub(super) struct NodeLine<'t> {
    /// Whether a missing weight turns the line into a name for its first operand.
    pub(super) optional: bool,
    pub(super) results: Vec<Named<'t>>,
    pub(super) callee: Callee<'t>,
    pub(super) args: Vec<Arg<'t>>,
    pub(super) attributes: Vec<Field<'t>>,
    pub(super) types: Vec<TypeText<'t>>,
    /// The right side.
    pub(super) span: Span,
}

/// A line of a region or fragment.
#[derive(Clone, Debug)]
pub(super) enum Line<'t> {
    /// `let` or `require`: the words that follow are still to be read.
    Let,
    /// See [`Line::Let`].
    Require,
    /// `return %a, %b`.
    Return(Vec<Named<'t>>),
    /// A node.
    Node(NodeLine<'t>),
    /// `%a = %b`, or `%a = if c then %b else %d`.
    Alias { name: Named<'t>, to: Target<'t>, types: Vec<TypeText<'t>> },
    /// `$w = term : type`.
    Weight { name: Named<'t>, term: Term<'t>, ty: Option<TypeText<'t>> },
    /// `#s = data "label" : f32[4]`.
    Data { name: Named<'t>, label: Named<'t>, ty: TypeText<'t> },
}

/// What an alias names.
#[derive(Clone, Debug)]
pub(super) enum Target<'t> {
    /// A value.
    Value(Named<'t>),
    /// One of two values, chosen now.
    Choice(Expr<'t>, Box<[Target<'t>; 2]>),
}

pub(super) fn value<'t>(c: &mut Cursor<'t>) -> Parsed<Named<'t>> {
    match c.peek() {
        Tok::Value(name) => Ok((name, c.next().1)),
        _ => Err(c.expected("a value such as %x")),
    }
}

/// `item {"," item}`.
fn some<'t, T>(c: &mut Cursor<'t>, mut item: impl FnMut(&mut Cursor<'t>) -> Parsed<T>) -> Parsed<Vec<T>> {
    let mut out = vec![item(c)?];
    while c.eat(",") {
        out.push(item(c)?);
    }
    Ok(out)
}

fn arg<'t>(c: &mut Cursor<'t>) -> Parsed<Arg<'t>> {
    match c.peek() {
        Tok::Value(name) => Ok(Arg::Value(name, c.next().1)),
        Tok::Weight(name) => Ok(Arg::Weight(name, c.next().1)),
        _ => Err(c.expected("an operand such as %x or $w")),
    }
}

fn target<'t>(c: &mut Cursor<'t>) -> Parsed<Target<'t>> {
    if !c.eat_word("if") {
        return value(c).map(Target::Value);
    }
    c.nested(|c| {
        let condition = Expr::parse(c)?;
        c.expect_word("then")?;
        let yes = target(c)?;
        c.expect_word("else")?;
        Ok(Target::Choice(condition, Box::new([yes, target(c)?])))
    })
}

fn types<'t>(c: &mut Cursor<'t>) -> Parsed<Vec<TypeText<'t>>> {
    if c.eat(":") { some(c, TypeText::parse) } else { Ok(Vec::new()) }
}

impl<'t> Line<'t> {
    pub(super) fn parse(c: &mut Cursor<'t>) -> Parsed<Self> {
        match c.peek() {
            Tok::Word("let") => {
                c.next();
                Ok(Line::Let)
            }
            Tok::Word("require") => {
                c.next();
                Ok(Line::Require)
            }
            Tok::Word("return") => {
                c.next();
                some(c, value).map(Line::Return)
            }
            Tok::Word("opt") => {
                c.next();
                Self::values(c, true)
            }
            Tok::Value(_) => Self::values(c, false),
            Tok::Weight(name) => {
                let name = (name, c.next().1);
                c.expect("=")?;
                let term = Term::parse(c)?;
                let ty = if c.eat(":") { Some(TypeText::parse(c)?) } else { None };
                Ok(Line::Weight { name, term, ty })
            }
            Tok::Data(name) => {
                let name = (name, c.next().1);
                c.expect("=")?;
                c.expect_word("data")?;
                let label = c.string("a label")?;
                c.expect(":")?;
                Ok(Line::Data { name, label, ty: TypeText::parse(c)? })
            }
            Tok::Word(_) | Tok::Int(_) | Tok::Float(_) | Tok::Str(_) | Tok::At(_) | Tok::Punct(_) | Tok::End => {
                Err(c.expected("a definition or `return`"))
            }
        }
    }

    fn values(c: &mut Cursor<'t>, optional: bool) -> Parsed<Self> {
        let results = some(c, value)?;
        c.expect("=")?;
        let start = c.span();
        let callee = match c.peek() {
            Tok::Value(_) | Tok::Word("if") => {
                let to = target(c)?;
                let types = types(c)?;
                return match (results.as_slice(), optional) {
                    ([name], false) => Ok(Line::Alias { name: *name, to, types }),
                    (_, true) => Err(Fail::syntax(start, "`opt` stands before an op")),
                    (_, false) => Err(Fail::syntax(start, "one value has one name")),
                };
            }
            Tok::Punct("(") => {
                c.next();
                let e = c.nested(Expr::parse)?;
                c.expect(")")?;
                Callee::Chosen(e)
            }
            Tok::Word("fused") => {
                c.next();
                match c.peek() {
                    Tok::At(name) => {
                        c.next();
                        Callee::Fused(name)
                    }
                    _ => return Err(c.expected("the name of a fused op such as @swiglu")),
                }
            }
            Tok::Word(word) => {
                c.next();
                Callee::Op(word)
            }
            Tok::Int(_)
            | Tok::Float(_)
            | Tok::Str(_)
            | Tok::Weight(_)
            | Tok::Data(_)
            | Tok::At(_)
            | Tok::Punct(_)
            | Tok::End => {
                return Err(c.expected("an op"));
            }
        };
        let args = match &callee {
            Callee::Fused(_) => {
                c.expect("(")?;
                c.list(")", arg)?
            }
            Callee::Op(_) | Callee::Chosen(_) => some(c, arg)?,
        };
        let attributes = if c.eat("{") { c.nested(|c| fields(c, "}"))? } else { Vec::new() };
        let span = start.to(c.before());
        Ok(Line::Node(NodeLine { optional, results, callee, args, attributes, types: types(c)?, span }))
    }
}
