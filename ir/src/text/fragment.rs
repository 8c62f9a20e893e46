//! A bare list of lines, as rewrite rules write them: `%s = silu %g` with free names and optional types.

use serde_json::{Map, Value as Json};

use crate::diag::{Diagnostics, Span};

use super::cursor::{Cursor, Fail, Parsed};
use super::lex::Tok;
use super::line::{Arg, Callee as Read, Line, NodeLine};
use super::scope::Scope;
use super::{Env, NoEnv};

/// Lines whose names mean nothing yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fragment {
    /// Each node line, in order.
    pub lines: Vec<FragmentLine>,
    /// The names after `return`, without sigil, if the last line is one.
    pub returns: Option<Vec<String>>,
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct FragmentLine {
    /// Names of the results, without sigil.
    pub results: Vec<String>,
    /// What is applied.
    pub callee: Callee,
    /// What it is applied to, in order.
    pub operands: Vec<FragmentOperand>,
    /// The attributes as written. A word without quotes is a string; a flag is `true`, or `false` if so written.
    pub attributes: Map<String, Json>,
    /// Where the line stands in the text.
    pub span: Span,
}

/// What a line applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Callee {
    /// An op's mnemonic.
    Op(String),
    /// A fused op's name, without `@`.
    Fused(String),
}

/// An operand with its sigil.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FragmentOperand {
    /// `%name`.
    Value(String),
    /// `$name`.
    Weight(String),
}

/// Reads lines.
///
/// # Errors
/// `P01` when the text does not have the form of node lines, `P02` for an unknown mnemonic or an attribute given twice;
/// each points into the text.
pub fn parse_fragment(text: &str) -> Result<Fragment, Diagnostics> {
    parse_fragment_with(text, &NoEnv)
}

/// Reads lines whose attributes are expressions over the names of `env`.
///
/// # Errors
/// As [`parse_fragment`], and `P04` for an expression that has no value.
pub fn parse_fragment_with(text: &str, env: &dyn Env) -> Result<Fragment, Diagnostics> {
    read(text, env).map_err(|f| f.report(text))
}

fn read(text: &str, env: &dyn Env) -> Parsed<Fragment> {
    let mut c = Cursor::new(text)?;
    let scope = Scope::new(env, text.len());
    let mut fragment = Fragment::default();
    while c.peek() != Tok::End {
        let start = c.span();
        match Line::parse(&mut c)? {
            Line::Node(node) => fragment.lines.push(line(&node, &scope, start.to(c.before()))?),
            Line::Return(results) => {
                fragment.returns = Some(results.iter().map(|(name, _)| (*name).to_owned()).collect());
                if c.peek() != Tok::End {
                    return Err(c.expected("the end, after `return`,"));
                }
            }
            Line::Let | Line::Require | Line::Alias { .. } | Line::Weight { .. } | Line::Data { .. } => {
                return Err(Fail::syntax(start, "only lines such as `%y = op %x, $w` can stand here"));
            }
        }
    }
    Ok(fragment)
}

fn line(node: &NodeLine<'_>, scope: &Scope<'_>, span: Span) -> Parsed<FragmentLine> {
    let callee = match &node.callee {
        Read::Op(word) if crate::op::Op::MNEMONICS.contains(word) => Callee::Op((*word).to_owned()),
        Read::Op(word) => {
            return Err(Fail::name(node.span, format!("`{}` is not an op", super::lex::shorten(word)))
                .note(format!("known: {}", crate::op::Op::MNEMONICS.join(", "))));
        }
        Read::Fused(name) => Callee::Fused((*name).to_owned()),
        Read::Chosen(e) => return Err(Fail::syntax(e.span, "an op chosen by an expression cannot stand here")),
    };
    if node.optional {
        return Err(Fail::syntax(span, "`opt` cannot stand here"));
    }
    let operand = |arg: &Arg<'_>| match *arg {
        Arg::Value(name, _) => FragmentOperand::Value(name.to_owned()),
        Arg::Weight(name, _) => FragmentOperand::Weight(name.to_owned()),
    };
    Ok(FragmentLine {
        results: node.results.iter().map(|(name, _)| (*name).to_owned()).collect(),
        callee,
        operands: node.args.iter().map(operand).collect(),
        attributes: scope.attributes(&node.attributes)?,
        span,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_names_sigils_and_attributes() {
        let text = "%g, %u = split %gu {sizes=[n,n]}  // free names\n%s = silu %g : f16[B,S,8]\n\
                    %y = linear %s, $w\n%m = fused @f(%y, $w)\nreturn %m";
        let f = parse_fragment(text).unwrap();
        assert_eq!(f.lines.len(), 4);
        assert_eq!(f.lines[0].results, ["g", "u"]);
        assert_eq!(f.lines[0].attributes["sizes"], serde_json::json!(["n", "n"]));
        assert_eq!(f.lines[2].operands, [FragmentOperand::Value("s".into()), FragmentOperand::Weight("w".into())]);
        assert_eq!(f.lines[3].callee, Callee::Fused("f".into()));
        assert_eq!(f.returns, Some(vec!["m".into()]));
        assert_eq!(&text[f.lines[2].span.start..f.lines[2].span.end], "%y = linear %s, $w");
    }

    #[test]
    fn what_is_no_node_line_is_refused() {
        for text in [
            "let a = 1",
            "%a = %b",
            "$w = \"x\" : f16[2]",
            "%a = nosuch %b",
            "%a = (x) %b",
            "%a = silu",
            "return %a %b",
        ] {
            assert!(parse_fragment(text).is_err(), "{text}");
        }
    }
}
