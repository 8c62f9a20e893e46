//! The values of compile-time names, and the evaluation of expressions over them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use crate::diag::Span;

use super::Env;
use super::cursor::{Cursor, Fail, Parsed};
use super::expr::{Binary, Expr, Field, Function, Kind, Num, RESERVED, equal, single, size};
use super::lex::{Piece, pieces, shorten};

/// What a text may add up to once layers and names are expanded, besides its own length.
const FUEL: u64 = 16 << 20;

/// How deep a value may nest.
const DEEP: u64 = 128;

/// Whether an unknown word stands for itself: enum variants are written without quotes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    /// It does: values of attributes.
    Plain,
    /// It is an error: everywhere else.
    Names,
}

/// The names of a text.
pub(super) struct Scope<'e> {
    pub(super) env: &'e dyn Env,
    globals: BTreeMap<String, (Json, u64)>,
    locals: BTreeMap<String, (Json, u64)>,
    /// The layer that is being read: the name `i`.
    pub(super) index: Option<u32>,
    /// Names that stand for numbers while the terms of a `stack` are built, innermost last.
    counters: RefCell<Vec<(String, u64)>>,
    /// Whether `let` makes names of the region at hand.
    pub(super) inside: bool,
    fuel: Cell<u64>,
}

impl<'e> Scope<'e> {
    /// No names yet; the text is `len` bytes long.
    pub(super) fn new(env: &'e dyn Env, len: usize) -> Self {
        Self {
            env,
            globals: BTreeMap::new(),
            locals: BTreeMap::new(),
            index: None,
            counters: RefCell::new(Vec::new()),
            inside: false,
            fuel: Cell::new(FUEL.saturating_add(2 * len as u64)),
        }
    }

    /// Enters a region: its names are its own.
    pub(super) fn enter(&mut self, index: Option<u32>) {
        self.locals.clear();
        self.index = index;
        self.inside = true;
    }

    /// Leaves the region.
    pub(super) fn leave(&mut self) {
        self.enter(None);
        self.inside = false;
    }

    /// Accounts for `n` bytes or entries of expanded text.
    pub(super) fn spend(&self, n: u64, span: Span) -> Parsed<()> {
        match self.fuel.get().checked_sub(n) {
            Some(left) => {
                self.fuel.set(left);
                Ok(())
            }
            None => Err(Fail::limit(span, "the text grows too large when it is expanded up to here")),
        }
    }

    /// `let name = value`.
    pub(super) fn bind(&mut self, name: &str, span: Span, value: Json) -> Parsed<()> {
        if RESERVED.contains(&name) {
            return Err(Fail::name(span, format!("`{name}` is a word of the language")));
        }
        let (entries, deep) = size(&value);
        if deep > DEEP {
            return Err(Fail::limit(span, "this value nests too deep"));
        }
        self.spend(entries, span)?;
        let names = if self.inside { &mut self.locals } else { &mut self.globals };
        match names.insert(name.to_owned(), (value, entries)) {
            None => Ok(()),
            Some(_) => Err(Fail::name(span, format!("`{}` has a value already", shorten(name)))),
        }
    }

    /// What `f` makes of the scope in which `name` is `value`.
    pub(super) fn counting<T>(&self, name: &str, value: u64, f: impl FnOnce() -> T) -> T {
        self.counters.borrow_mut().push((name.to_owned(), value));
        let out = f();
        self.counters.borrow_mut().pop();
        out
    }

    /// `NAME = EXPR {"," NAME = EXPR}` after `let`.
    pub(super) fn bindings(&mut self, c: &mut Cursor<'_>) -> Parsed<()> {
        loop {
            let (name, span) = c.word("a name")?;
            c.expect("=")?;
            let value = self.eval(&Expr::parse(c)?)?;
            self.bind(name, span, value)?;
            if !c.eat(",") {
                return Ok(());
            }
        }
    }

    /// `EXPR, "message"` after `require`.
    pub(super) fn require(&self, c: &mut Cursor<'_>) -> Parsed<()> {
        let condition = Expr::parse(c)?;
        c.expect(",")?;
        let (message, at) = c.string("a message")?;
        if self.truth(&condition)? { Ok(()) } else { Err(Fail::value(condition.span, self.text(message, at)?)) }
    }

    /// The value of an expression in which every name is known.
    pub(super) fn eval(&self, e: &Expr<'_>) -> Parsed<Json> {
        self.compute(e, Words::Names)
    }

    /// The attributes `key=value, …`. Those that come out as `none` are left out.
    pub(super) fn attributes(&self, fields: &[Field<'_>]) -> Parsed<Map<String, Json>> {
        let mut map = Map::new();
        for field in fields {
            let value = match &field.value {
                Some(e) => self.compute(e, Words::Plain)?,
                None => Json::Bool(true),
            };
            if map.contains_key(&field.key) {
                return Err(Fail::name(field.span, format!("the attribute `{}` is given twice", shorten(&field.key))));
            }
            if !value.is_null() {
                map.insert(field.key.clone(), value);
            }
        }
        Ok(map)
    }

    /// A condition; `none` counts as false.
    pub(super) fn truth(&self, e: &Expr<'_>) -> Parsed<bool> {
        match self.eval(e)? {
            Json::Bool(b) => Ok(b),
            Json::Null => Ok(false),
            other => Err(Fail::value(e.span, format!("true or false is needed here, this is {}", show(&other)))),
        }
    }

    /// A number that is not negative.
    pub(super) fn whole(&self, e: &Expr<'_>) -> Parsed<u64> {
        let value = self.eval(e)?;
        value.as_u64().ok_or_else(|| {
            Fail::value(e.span, format!("a whole number that is not negative is needed here, this is {}", show(&value)))
        })
    }

    /// A string with its names replaced by their values.
    pub(super) fn text(&self, raw: &str, span: Span) -> Parsed<String> {
        self.spend(1 + raw.len() as u64 / 16, span)?;
        let mut out = String::new();
        for piece in pieces(raw, span)? {
            match piece {
                Piece::Char(c) => out.push(c),
                Piece::Name(name) => {
                    let path: Vec<&str> = name.split('.').collect();
                    let value = match self.lookup(&path, span)? {
                        Json::String(s) => s,
                        Json::Number(n) => n.to_string(),
                        other => {
                            return Err(Fail::value(span, format!("`{{{}}}` is {}", shorten(name), show(&other))));
                        }
                    };
                    self.spend(1 + value.len() as u64 / 16, span)?;
                    out.push_str(&value);
                }
            }
        }
        Ok(out)
    }

    /// The value of a name, `none` for a path into `config` that leads nowhere.
    fn lookup(&self, path: &[&str], span: Span) -> Parsed<Json> {
        self.find(path, span)?
            .ok_or_else(|| Fail::name(span, format!("`{}` is not a name that is known here", shorten(&path.join(".")))))
    }

    /// Whether a word has a value.
    pub(super) fn knows(&self, word: &str) -> bool {
        matches!(self.find(&[word], Span::default()), Ok(Some(_)))
    }

    fn find(&self, path: &[&str], span: Span) -> Parsed<Option<Json>> {
        let [head, tail @ ..] = path else { return Ok(None) };
        if let (&"i", Some(i), []) = (head, self.index, tail) {
            return Ok(Some(i.into()));
        }
        if let (Some((_, value)), []) = (self.counters.borrow().iter().rev().find(|(n, _)| n == head), tail) {
            return Ok(Some((*value).into()));
        }
        if let Some((value, entries)) = self.locals.get(*head).or_else(|| self.globals.get(*head)) {
            self.spend(*entries, span)?;
            let found = tail.iter().try_fold(value, |v, key| v.get(key));
            return Ok(Some(found.cloned().unwrap_or(Json::Null)));
        }
        if let Some(value) = self.env.lookup(&path.join(".")) {
            self.spend(size(&value).0, span)?;
            return Ok(Some(value));
        }
        Ok((*head == "config" && !tail.is_empty()).then_some(Json::Null))
    }

    fn compute(&self, e: &Expr<'_>, words: Words) -> Parsed<Json> {
        self.spend(1, e.span)?;
        let number = |e: &Expr<'_>| -> Parsed<Num> {
            let value = self.eval(e)?;
            Num::of(&value)
                .ok_or_else(|| Fail::value(e.span, format!("a number is needed here, this is {}", show(&value))))
        };
        match &e.kind {
            Kind::Literal(value) => Ok(value.clone()),
            Kind::Text(raw) => self.text(raw, e.span).map(Json::String),
            Kind::Path(path) => match (self.find(path, e.span)?, path.as_slice(), words) {
                (Some(value), _, _) => Ok(value),
                (None, [word], Words::Plain) => Ok(Json::String((*word).to_owned())),
                (None, _, _) => self.lookup(path, e.span),
            },
            Kind::Index(parts) => {
                let [of, index] = parts.as_ref();
                match self.eval(of)? {
                    Json::Null => Ok(Json::Null),
                    Json::Array(items) => {
                        let at = self.whole(index)?;
                        let found = usize::try_from(at).ok().and_then(|i| items.get(i).cloned());
                        found.ok_or_else(|| Fail::value(index.span, format!("entry {at} of a list of {}", items.len())))
                    }
                    other => Err(Fail::value(of.span, format!("a list is needed here, this is {}", show(&other)))),
                }
            }
            Kind::Member(of, key) => Ok(self.eval(of)?.get(key).cloned().unwrap_or(Json::Null)),
            Kind::Negate(of) => match number(of)? {
                Num::Int(n) => Num::Int(-n).json(e.span),
                Num::Float(x) => Num::Float(-x).json(e.span),
            },
            Kind::Not(of) => Ok((!self.truth(of)?).into()),
            Kind::Binary(op, parts) => {
                let [a, b] = parts.as_ref();
                match op {
                    Binary::Or => Ok((self.truth(a)? || self.truth(b)?).into()),
                    Binary::And => Ok((self.truth(a)? && self.truth(b)?).into()),
                    Binary::Default => match self.compute(a, words)? {
                        Json::Null => self.compute(b, words),
                        value => Ok(value),
                    },
                    Binary::Equal => Ok(equal(&self.eval(a)?, &self.eval(b)?).into()),
                    Binary::Differs => Ok((!equal(&self.eval(a)?, &self.eval(b)?)).into()),
                    Binary::Less => Ok((number(a)?.float() < number(b)?.float()).into()),
                    Binary::AtMost => Ok((number(a)?.float() <= number(b)?.float()).into()),
                    Binary::More => Ok((number(a)?.float() > number(b)?.float()).into()),
                    Binary::AtLeast => Ok((number(a)?.float() >= number(b)?.float()).into()),
                    Binary::Plus | Binary::Minus | Binary::Times | Binary::Over | Binary::Modulo => {
                        Num::arithmetic(*op, number(a)?, number(b)?).map_err(|m| Fail::value(e.span, m))?.json(e.span)
                    }
                }
            }
            Kind::Choice(parts) => {
                let [condition, yes, no] = parts.as_ref();
                self.compute(if self.truth(condition)? { yes } else { no }, words)
            }
            Kind::Call(f, args) => self.call(*f, args, e.span),
            Kind::List(items) => {
                items.iter().map(|e| self.compute(e, words)).collect::<Parsed<Vec<_>>>().map(Json::Array)
            }
            Kind::Object(fields) => self.attributes(fields).map(Json::Object),
            Kind::Variant(name, fields) => Ok(single(name, Json::Object(self.attributes(fields)?))),
        }
    }

    fn call(&self, f: Function, args: &[Expr<'_>], span: Span) -> Parsed<Json> {
        let values = args.iter().map(|e| self.eval(e)).collect::<Parsed<Vec<_>>>()?;
        if let (Function::Len, [value]) = (f, values.as_slice()) {
            return match value {
                Json::Array(items) => Ok(items.len().into()),
                other => Err(Fail::value(span, format!("len of {}", show(other)))),
            };
        }
        if let (Function::Contains, [list, value]) = (f, values.as_slice()) {
            return match list {
                Json::Array(items) => Ok(items.iter().any(|item| equal(item, value)).into()),
                other => Err(Fail::value(span, format!("contains of {}", show(other)))),
            };
        }
        let numbers: Option<Vec<Num>> = values.iter().map(Num::of).collect();
        let Some(numbers) = numbers else { return Err(Fail::value(span, "numbers are needed here")) };
        let best = |better: fn(f64, f64) -> bool| {
            numbers.iter().copied().reduce(|a, b| if better(b.float(), a.float()) { b } else { a })
        };
        let out = match (f, numbers.as_slice()) {
            (Function::Sqrt, [x]) => Some(Num::Float(x.float().sqrt())),
            (Function::Ln, [x]) => Some(Num::Float(x.float().ln())),
            (Function::Float, [x]) => Some(Num::Float(x.float())),
            (Function::Int, [Num::Int(n)]) => Some(Num::Int(*n)),
            (Function::Int, [Num::Float(x)]) if x.fract() == 0.0 && x.abs() < 1e15 => Some(Num::Int(*x as i128)),
            (Function::Floor, [x]) if x.float().abs() < 1e15 => Some(Num::Int(x.float().floor() as i128)),
            (Function::Min, [_, ..]) => best(|a, b| a < b),
            (Function::Max, [_, ..]) => best(|a, b| a > b),
            (
                Function::Sqrt
                | Function::Ln
                | Function::Float
                | Function::Int
                | Function::Floor
                | Function::Len
                | Function::Contains
                | Function::Min
                | Function::Max,
                _,
            ) => None,
        };
        out.ok_or_else(|| Fail::value(span, "this function does not take these values"))?.json(span)
    }
}

/// A value in a message.
pub(super) fn show(json: &Json) -> String {
    match json {
        Json::Null => "none".into(),
        Json::String(s) => format!("{:?}", shorten(s)),
        Json::Array(items) => format!("a list of {}", items.len()),
        Json::Object(_) => "an object".into(),
        Json::Bool(_) | Json::Number(_) => json.to_string(),
    }
}
