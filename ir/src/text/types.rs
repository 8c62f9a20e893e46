//! Types in the text: `f16[B,S,4096]`, `u4g128@rows[4096,4096]`, `T[B,S,heads*hd]`.

use crate::diag::Span;
use crate::ty::{Dim, Elem, Layout, Name, Type};

use super::cursor::{Cursor, Fail, Parsed};
use super::expr::Expr;
use super::lex::Tok;
use super::scope::Scope;

/// The most axes a type may have.
const RANK: usize = 8;

/// A type that was read but whose dimensions are not computed yet.
#[derive(Clone, Debug)]
pub(super) struct TypeText<'t> {
    elem: Option<Elem>,
    layout: Option<Layout>,
    dims: Vec<Expr<'t>>,
    pub(super) span: Span,
}

impl<'t> TypeText<'t> {
    pub(super) fn parse(c: &mut Cursor<'t>) -> Parsed<Self> {
        let (word, start) = c.word("a type such as f16[B,S,64]")?;
        let elem = match word {
            "T" => None,
            word => Some(word.parse().map_err(|e: String| Fail::ty(start, e))?),
        };
        let layout = match c.peek() {
            Tok::At(name) => {
                let span = c.next().1;
                Some(name.parse::<Layout>().map_err(|e| Fail::ty(span, e))?)
            }
            _ => None,
        };
        c.expect("[")?;
        let dims = c.nested(|c| c.list("]", Expr::parse))?;
        let span = start.to(c.before());
        if dims.len() > RANK {
            return Err(Fail::limit(span, format!("a type has at most {RANK} axes")));
        }
        Ok(Self { elem, layout, dims, span })
    }

    /// The type, where `T` is `dtype` and `symbols` are the declared dimensions.
    pub(super) fn resolve(&self, scope: &Scope<'_>, dtype: Elem, symbols: &[Name]) -> Parsed<Type> {
        let dim = |e: &Expr<'_>| match e.as_word().and_then(|w| symbols.iter().find(|s| &***s == w)) {
            Some(symbol) => Ok(Dim::Sym(symbol.clone())),
            None => scope.whole(e).map(Dim::Const).map_err(|f| match f.code {
                "P02" => f.note("symbolic dimensions are declared by a `dim` line"),
                _ => f,
            }),
        };
        let shape = self.dims.iter().map(dim).collect::<Parsed<Vec<_>>>()?;
        Ok(Type { elem: self.elem.unwrap_or(dtype), layout: self.layout, shape })
    }
}
