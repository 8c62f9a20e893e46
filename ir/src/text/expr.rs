//! Compile-time expressions: what may stand where a number, an attribute, a string or a layer range is expected.

use serde_json::{Map, Number, Value as Json};

use crate::diag::Span;

use super::cursor::{Cursor, Fail, Parsed};
use super::lex::{Tok, shorten};

/// An expression that was read but not yet computed.
#[derive(Clone, Debug)]
pub(super) struct Expr<'t> {
    pub(super) kind: Kind<'t>,
    pub(super) span: Span,
    height: u16,
}

/// What an expression does.
#[derive(Clone, Debug)]
pub(super) enum Kind<'t> {
    /// A number, `true`, `false` or `none`.
    Literal(Json),
    /// A string with its escapes and `{name}`s.
    Text(&'t str),
    /// `name` or `config.name.name`.
    Path(Vec<&'t str>),
    /// `list[i]`.
    Index(Box<[Expr<'t>; 2]>),
    /// `x.name` where `x` is not a path.
    Member(Box<Expr<'t>>, &'t str),
    /// `-x`.
    Negate(Box<Expr<'t>>),
    /// `not x`.
    Not(Box<Expr<'t>>),
    /// `a op b`.
    Binary(Binary, Box<[Expr<'t>; 2]>),
    /// `if c then a else b`.
    Choice(Box<[Expr<'t>; 3]>),
    /// `sqrt(x)`.
    Call(Function, Vec<Expr<'t>>),
    /// `[a, b]`.
    List(Vec<Expr<'t>>),
    /// `{a=1, flag}`.
    Object(Vec<Field<'t>>),
    /// `bands(factor=8.0)`: an enum variant with fields.
    Variant(&'t str, Vec<Field<'t>>),
}

/// `key=value`, or `key` alone for `key=true`.
#[derive(Clone, Debug)]
pub(super) struct Field<'t> {
    pub(super) key: String,
    pub(super) value: Option<Expr<'t>>,
    pub(super) span: Span,
}

/// What stands between two expressions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary {
    Or,
    And,
    Equal,
    Differs,
    Less,
    AtMost,
    More,
    AtLeast,
    Default,
    Plus,
    Minus,
    Times,
    Over,
    Modulo,
}

impl Binary {
    /// The operator that a token means, and how strongly it binds.
    fn of(tok: Tok<'_>) -> Option<(Binary, u8)> {
        Some(match tok {
            Tok::Word("or") => (Binary::Or, 1),
            Tok::Word("and") => (Binary::And, 2),
            Tok::Punct("==") => (Binary::Equal, 4),
            Tok::Punct("!=") => (Binary::Differs, 4),
            Tok::Punct("<") => (Binary::Less, 4),
            Tok::Punct("<=") => (Binary::AtMost, 4),
            Tok::Punct(">") => (Binary::More, 4),
            Tok::Punct(">=") => (Binary::AtLeast, 4),
            Tok::Punct("??") => (Binary::Default, 5),
            Tok::Punct("+") => (Binary::Plus, 6),
            Tok::Punct("-") => (Binary::Minus, 6),
            Tok::Punct("*") => (Binary::Times, 7),
            Tok::Punct("/") => (Binary::Over, 7),
            Tok::Punct("%") => (Binary::Modulo, 7),
            _ => return None,
        })
    }
}

macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident $name:literal,)*) => {
        /// A function of expressions.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Function { $($(#[$doc])* $variant,)* }

        impl Function {
            /// The function of this name.
            pub(super) fn of(name: &str) -> Option<Self> {
                match name { $($name => Some(Function::$variant),)* _ => None }
            }
        }
    };
}

functions! {
    /// Square root, a float.
    Sqrt "sqrt",
    /// Natural logarithm, a float.
    Ln "ln",
    /// A whole float as an integer.
    Int "int",
    /// The largest integer that is not above a number.
    Floor "floor",
    /// A number as a float.
    Float "float",
    /// The length of a list.
    Len "len",
    /// Whether a list holds a value.
    Contains "contains",
    /// The smallest of numbers.
    Min "min",
    /// The largest of numbers.
    Max "max",
}

/// Words that are no names.
pub(super) const RESERVED: [&str; 10] = ["true", "false", "none", "if", "then", "else", "and", "or", "not", "i"];

/// How high the tree of an expression may grow: evaluation recurses this deep.
const HEIGHT: u16 = 96;

impl<'t> Expr<'t> {
    fn new(kind: Kind<'t>, span: Span) -> Parsed<Self> {
        let fields = |f: &[Field<'t>]| f.iter().filter_map(|f| f.value.as_ref()).map(|e| e.height).max().unwrap_or(0);
        let below = match &kind {
            Kind::Literal(_) | Kind::Text(_) | Kind::Path(_) => 0,
            Kind::Index(parts) | Kind::Binary(_, parts) => parts.iter().map(|e| e.height).max().unwrap_or(0),
            Kind::Member(of, _) | Kind::Negate(of) | Kind::Not(of) => of.height,
            Kind::Choice(parts) => parts.iter().map(|e| e.height).max().unwrap_or(0),
            Kind::Call(_, args) | Kind::List(args) => args.iter().map(|e| e.height).max().unwrap_or(0),
            Kind::Object(f) | Kind::Variant(_, f) => fields(f),
        };
        if below >= HEIGHT {
            return Err(Fail::limit(span, "this expression is too long: name a part of it with `let`"));
        }
        Ok(Self { kind, span, height: below + 1 })
    }

    /// Reads an expression.
    pub(super) fn parse(c: &mut Cursor<'t>) -> Parsed<Self> {
        if c.is_word("if") {
            return c.nested(|c| {
                let start = c.next().1;
                let condition = Self::parse(c)?;
                c.expect_word("then")?;
                let yes = Self::parse(c)?;
                c.expect_word("else")?;
                let no = Self::parse(c)?;
                let span = start.to(no.span);
                Self::new(Kind::Choice(Box::new([condition, yes, no])), span)
            });
        }
        Self::binary(c, 0)
    }

    /// Reads operators that bind more strongly than `floor`.
    fn binary(c: &mut Cursor<'t>, floor: u8) -> Parsed<Self> {
        let mut left = Self::prefix(c)?;
        while let Some((op, strength)) = Binary::of(c.peek()) {
            if strength <= floor {
                break;
            }
            c.next();
            // `a ?? b ?? c` groups to the right, everything else to the left.
            let right = if op == Binary::Default {
                c.nested(|c| Self::binary(c, strength - 1))?
            } else {
                c.nested(|c| Self::binary(c, strength))?
            };
            let span = left.span.to(right.span);
            left = Self::new(Kind::Binary(op, Box::new([left, right])), span)?;
        }
        Ok(left)
    }

    fn prefix(c: &mut Cursor<'t>) -> Parsed<Self> {
        let start = c.span();
        if c.eat("-") {
            let of = c.nested(Self::prefix)?;
            let span = start.to(of.span);
            return Self::new(Kind::Negate(Box::new(of)), span);
        }
        if c.eat_word("not") {
            // Weaker than a comparison: `not a == b` is `not (a == b)`.
            let of = c.nested(|c| Self::binary(c, 3))?;
            let span = start.to(of.span);
            return Self::new(Kind::Not(Box::new(of)), span);
        }
        let mut of = Self::primary(c)?;
        loop {
            if c.eat("[") {
                let index = c.nested(Self::parse)?;
                c.expect("]")?;
                let span = of.span.to(c.before());
                of = Self::new(Kind::Index(Box::new([of, index])), span)?;
            } else if c.is(".") && matches!(c.ahead(1), Tok::Word(_)) {
                c.next();
                let (name, end) = c.word("a name")?;
                let span = of.span.to(end);
                of = match of.kind {
                    Kind::Path(mut path) => {
                        path.push(name);
                        Self::new(Kind::Path(path), span)?
                    }
                    kind => Self::new(Kind::Member(Box::new(Self { kind, ..of }), name), span)?,
                };
            } else {
                return Ok(of);
            }
        }
    }

    fn primary(c: &mut Cursor<'t>) -> Parsed<Self> {
        let (tok, span) = (c.peek(), c.span());
        let kind = match tok {
            Tok::Int(n) => Kind::Literal(n.into()),
            Tok::Float(x) => Kind::Literal(Json::from(x)),
            Tok::Str(s) => Kind::Text(s),
            Tok::Word("true") => Kind::Literal(true.into()),
            Tok::Word("false") => Kind::Literal(false.into()),
            Tok::Word("none") => Kind::Literal(Json::Null),
            Tok::Word("then" | "else" | "and" | "or") => return Err(c.expected("a value")),
            Tok::Word(name) if matches!(c.ahead(1), Tok::Punct("(")) => {
                c.next();
                c.next();
                let kind = match Function::of(name) {
                    Some(f) => Kind::Call(f, c.nested(|c| c.list(")", Self::parse))?),
                    None => Kind::Variant(name, c.nested(|c| fields(c, ")"))?),
                };
                return Self::new(kind, span.to(c.before()));
            }
            Tok::Word(name) => Kind::Path(vec![name]),
            Tok::Punct("(") => {
                c.next();
                let inner = c.nested(Self::parse)?;
                c.expect(")")?;
                return Ok(Self { span: span.to(c.before()), ..inner });
            }
            Tok::Punct("[") => {
                c.next();
                let items = c.nested(|c| c.list("]", Self::parse))?;
                return Self::new(Kind::List(items), span.to(c.before()));
            }
            Tok::Punct("{") => {
                c.next();
                let fields = c.nested(|c| fields(c, "}"))?;
                return Self::new(Kind::Object(fields), span.to(c.before()));
            }
            Tok::Value(_) | Tok::Weight(_) | Tok::Data(_) | Tok::At(_) | Tok::Punct(_) | Tok::End => {
                return Err(c.expected("a value"));
            }
        };
        c.next();
        Self::new(kind, span)
    }

    /// The name, if the expression is nothing else.
    pub(super) fn as_word(&self) -> Option<&'t str> {
        match &self.kind {
            Kind::Path(path) => match path.as_slice() {
                [word] => Some(word),
                _ => None,
            },
            _ => None,
        }
    }
}

/// `key=value, flag, …` up to the closing token, which is taken.
pub(super) fn fields<'t>(c: &mut Cursor<'t>, close: &'static str) -> Parsed<Vec<Field<'t>>> {
    c.list(close, field)
}

/// `key=value, flag, …` up to the end of the text.
pub(super) fn fields_to_end<'t>(c: &mut Cursor<'t>) -> Parsed<Vec<Field<'t>>> {
    let mut out = Vec::new();
    while c.peek() != Tok::End {
        out.push(field(c)?);
        if c.peek() != Tok::End {
            c.expect(",")?;
        }
    }
    Ok(out)
}

fn field<'t>(c: &mut Cursor<'t>) -> Parsed<Field<'t>> {
    let (tok, span) = c.next();
    let key = match tok {
        Tok::Word(w) => w.to_owned(),
        Tok::Str(s) => plain(s, span)?,
        other => return Err(Fail::syntax(span, format!("an attribute is expected here, not {other}"))),
    };
    let value = if c.eat("=") { Some(Expr::parse(c)?) } else { None };
    Ok(Field { key, value, span })
}

/// A string in which no names are replaced.
pub(super) fn plain(raw: &str, span: Span) -> Parsed<String> {
    use super::lex::{Piece, pieces};
    pieces(raw, span)?
        .into_iter()
        .map(|p| match p {
            Piece::Char(c) => Ok(c),
            Piece::Name(n) => Err(Fail::syntax(span, format!("`{{{}}}` cannot stand in this string", shorten(n)))),
        })
        .collect()
}

/// A number in the middle of a computation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Num {
    Int(i128),
    Float(f64),
}

impl Num {
    pub(super) fn of(json: &Json) -> Option<Self> {
        let n = json.as_number()?;
        let int = n.as_u64().map(i128::from).or_else(|| n.as_i64().map(i128::from));
        int.map(Num::Int).or_else(|| n.as_f64().map(Num::Float))
    }

    pub(super) fn float(self) -> f64 {
        match self {
            Num::Int(n) => n as f64,
            Num::Float(x) => x,
        }
    }

    pub(super) fn json(self, span: Span) -> Parsed<Json> {
        let number = match self {
            Num::Int(n) => u64::try_from(n).map(Number::from).or_else(|_| i64::try_from(n).map(Number::from)).ok(),
            Num::Float(x) => Number::from_f64(x),
        };
        number.map(Json::Number).ok_or_else(|| Fail::value(span, "the result of this is too large, or no number"))
    }

    /// `a op b` for the operators of arithmetic. Integers stay integers; their division must leave no remainder.
    pub(super) fn arithmetic(op: Binary, a: Num, b: Num) -> Result<Num, String> {
        if let (Num::Int(a), Num::Int(b)) = (a, b) {
            let out = match op {
                Binary::Plus => a.checked_add(b),
                Binary::Minus => a.checked_sub(b),
                Binary::Times => a.checked_mul(b),
                Binary::Over | Binary::Modulo if b == 0 => return Err(format!("{a} is divided by 0")),
                Binary::Over if a % b != 0 => {
                    return Err(format!("{a} / {b} leaves a remainder; a float division is written float(…) / …"));
                }
                Binary::Over => a.checked_div(b),
                Binary::Modulo => a.checked_rem_euclid(b),
                Binary::Or
                | Binary::And
                | Binary::Equal
                | Binary::Differs
                | Binary::Less
                | Binary::AtMost
                | Binary::More
                | Binary::AtLeast
                | Binary::Default => None,
            };
            return out.map(Num::Int).ok_or_else(|| "the result of this is too large".to_owned());
        }
        let (a, b) = (a.float(), b.float());
        Ok(Num::Float(match op {
            Binary::Plus => a + b,
            Binary::Minus => a - b,
            Binary::Times => a * b,
            Binary::Over => a / b,
            Binary::Modulo => a.rem_euclid(b),
            Binary::Or
            | Binary::And
            | Binary::Equal
            | Binary::Differs
            | Binary::Less
            | Binary::AtMost
            | Binary::More
            | Binary::AtLeast
            | Binary::Default => f64::NAN,
        }))
    }
}

/// Whether two values are equal; `1` and `1.0` are.
pub(super) fn equal(a: &Json, b: &Json) -> bool {
    match (Num::of(a), Num::of(b)) {
        (Some(Num::Int(a)), Some(Num::Int(b))) => a == b,
        (Some(a), Some(b)) => a.float() == b.float(),
        (None, _) | (_, None) => a == b,
    }
}

/// Entries of a value and of what is in it, and how deep it nests.
pub(super) fn size(json: &Json) -> (u64, u64) {
    let all = |items: &mut dyn Iterator<Item = &Json>| {
        items.map(size).fold((1u64, 1), |(n, deep), (m, d)| (n.saturating_add(m), deep.max(d + 1)))
    };
    match json {
        Json::Null | Json::Bool(_) | Json::Number(_) => (1, 1),
        Json::String(s) => (1 + s.len() as u64 / 16, 1),
        Json::Array(items) => all(&mut items.iter()),
        Json::Object(map) => all(&mut map.values()),
    }
}

/// An object of one entry.
pub(super) fn single(key: &str, value: Json) -> Json {
    Json::Object(Map::from_iter([(key.to_owned(), value)]))
}
