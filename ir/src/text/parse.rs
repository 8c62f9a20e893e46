//! A module's text to a module.

use std::collections::BTreeMap;

use crate::diag::Span;
use crate::module::{FusedDef, Module};
use crate::region::{Region, RegionName};
use crate::ty::{Elem, Name};

use super::Env;
use super::body::{Body, Context};
use super::cursor::{Cursor, Fail, Parsed};
use super::expr::{Expr, fields};
use super::lex::{Tok, shorten};
use super::line::Arg;
use super::scope::{Scope, show};
use super::types::TypeText;

/// The version of the language that this compiler reads and writes.
pub const VERSION: u64 = 1;

/// The most layers a module may have.
pub(crate) const LAYERS: usize = 10_000;

/// The most fused definitions a module may have.
const FUSED: usize = 1024;

/// The parts of a region's first line.
struct Header<'t> {
    params: Vec<(Arg<'t>, TypeText<'t>)>,
    prefix: Option<(&'t str, Span)>,
    when: Option<Expr<'t>>,
    /// The token after the opening brace.
    body: usize,
}

struct Parser<'t, 'e> {
    c: Cursor<'t>,
    scope: Scope<'e>,
    module: Module,
    /// Where the run of layers that is being read began in the list of regions.
    run: Option<usize>,
}

/// See [`super::parse_with`].
pub(super) fn module(text: &str, env: &dyn Env) -> Parsed<Module> {
    let mut parser = Parser {
        c: Cursor::new(text)?,
        scope: Scope::new(env, text.len()),
        module: Module::new("", Elem::F16),
        run: None,
    };
    parser.read()?;
    Ok(parser.module)
}

impl<'t> Parser<'t, '_> {
    fn read(&mut self) -> Parsed<()> {
        self.c.expect_word("awqir").map_err(|f| f.note("a text of this language starts with `awqir 1`"))?;
        let at = self.c.span();
        let version = self.c.int("a version")?;
        if version != VERSION {
            return Err(Fail::syntax(
                at,
                format!("version {version} of the language is not known: this compiler reads {VERSION}"),
            ));
        }
        let (mut model, mut dims) = (false, false);
        loop {
            let (tok, span) = self.c.next();
            let once = |seen: &mut bool, what: &str| {
                if std::mem::replace(seen, true) {
                    Err(Fail::syntax(span, format!("a second `{what}` line")))
                } else {
                    Ok(())
                }
            };
            match tok {
                Tok::End => break,
                Tok::Word("let") => self.scope.bindings(&mut self.c)?,
                Tok::Word("require") => self.scope.require(&mut self.c)?,
                Tok::Word("model") => {
                    once(&mut model, "model")?;
                    self.model()?;
                }
                Tok::Word("dim") => {
                    once(&mut dims, "dim")?;
                    self.dims()?;
                }
                Tok::Word("fused") => self.fused()?,
                Tok::Word("region") => {
                    self.end_run()?;
                    self.region()?;
                }
                Tok::Word("layer") => {
                    self.run.get_or_insert(self.module.regions.len());
                    self.layers()?;
                }
                other => {
                    let what = "`model`, `dim`, `let`, `require`, `fused`, `region` or `layer`";
                    return Err(Fail::syntax(span, format!("{what} is expected here, not {other}")));
                }
            }
        }
        self.end_run()
    }

    /// `"name" {dtype=f16, key=value}` after `model`.
    fn model(&mut self) -> Parsed<()> {
        let (raw, span) = self.c.string("the model's name")?;
        self.module.name = self.scope.text(raw, span)?.into();
        if !self.c.eat("{") {
            return Ok(());
        }
        let list = self.c.nested(|c| fields(c, "}"))?;
        let mut header = self.scope.attributes(&list)?;
        if let Some(dtype) = header.shift_remove("dtype") {
            let at = list.iter().find(|f| f.key == "dtype").map_or(span, |f| f.span);
            let elem = dtype.as_str().and_then(|s| s.parse::<Elem>().ok()).filter(|e| e.is_float());
            self.module.dtype =
                elem.ok_or_else(|| Fail::ty(at, format!("dtype is f16, bf16 or f32, not {}", show(&dtype))))?;
        }
        self.module.header = header;
        Ok(())
    }

    /// `B, S` after `dim`, or `none`.
    fn dims(&mut self) -> Parsed<()> {
        let mut dims: Vec<Name> = Vec::new();
        if !self.c.eat_word("none") {
            loop {
                let (name, span) = self.c.word("a dimension such as B")?;
                if dims.iter().any(|d| **d == *name) {
                    return Err(Fail::name(span, format!("the dimension {} is declared twice", shorten(name))));
                }
                if dims.len() >= 64 {
                    return Err(Fail::limit(span, "at most 64 dimensions can be declared"));
                }
                dims.push(name.into());
                if !self.c.eat(",") {
                    break;
                }
            }
        }
        self.module.dims = dims;
        Ok(())
    }

    fn symbol(&mut self, what: &str) -> Parsed<(&'t str, Span)> {
        match self.c.peek() {
            Tok::At(name) => Ok((name, self.c.next().1)),
            _ => Err(self.c.expected(what)),
        }
    }

    /// `(…) [from "prefix"] [when EXPR] {`.
    fn header(&mut self) -> Parsed<Header<'t>> {
        let c = &mut self.c;
        c.expect("(")?;
        let params = c.list(")", |c| {
            let arg = match c.peek() {
                Tok::Value(name) => Arg::Value(name, c.next().1),
                Tok::Weight(name) => Arg::Weight(name, c.next().1),
                _ => return Err(c.expected("a parameter such as %x: f16[B,S,64]")),
            };
            c.expect(":")?;
            Ok((arg, TypeText::parse(c)?))
        })?;
        let (mut prefix, mut when) = (None, None);
        loop {
            if prefix.is_none() && c.eat_word("from") {
                prefix = Some(c.string("the prefix of tensor names")?);
            } else if when.is_none() && c.eat_word("when") {
                when = Some(Expr::parse(c)?);
            } else {
                break;
            }
        }
        c.expect("{")?;
        Ok(Header { params, prefix, when, body: c.at })
    }

    /// Moves past the closing brace of a body that is not wanted.
    fn skip(&mut self, header: &Header<'t>) -> Parsed<()> {
        self.c.at = header.body;
        let mut open = 1usize;
        while open > 0 {
            match self.c.next() {
                (Tok::Punct("{"), _) => open += 1,
                (Tok::Punct("}"), _) => open -= 1,
                (Tok::End, span) => return Err(Fail::syntax(span, "`}` is missing here")),
                _ => {}
            }
        }
        Ok(())
    }

    /// One instance of a region; `None` if its condition does not hold.
    fn instance(&mut self, header: &Header<'t>, name: RegionName) -> Parsed<Option<Region>> {
        if let Some(when) = &header.when
            && !self.scope.truth(when)?
        {
            return Ok(None);
        }
        let prefix = header.prefix.map_or(Ok(String::new()), |(raw, span)| self.scope.text(raw, span))?;
        let mut body = Body::new(Region::new(name, prefix));
        let mut cx = Context {
            scope: &mut self.scope,
            dtype: self.module.dtype,
            dims: &self.module.dims,
            fused: &self.module.fused,
        };
        for (arg, ty) in &header.params {
            body.param(*arg, ty, &cx)?;
        }
        self.c.at = header.body;
        let start = self.c.span();
        let region = body.read(&mut self.c, &mut cx)?;
        cx.scope.spend((self.c.span().end - start.start) as u64, start)?;
        Ok(Some(region))
    }

    /// `@name (…) {…}` after `fused`.
    fn fused(&mut self) -> Parsed<()> {
        let (name, span) = self.symbol("the name of a fused op such as @swiglu")?;
        if self.module.fused_def(name).is_some() {
            return Err(Fail::name(span, format!("@{} is defined already", shorten(name))));
        }
        if self.module.fused.len() >= FUSED {
            return Err(Fail::limit(span, format!("a module has at most {FUSED} fused ops")));
        }
        self.scope.enter(None);
        let header = self.header()?;
        let body = self.instance(&header, RegionName::Named(name.into()))?;
        self.scope.leave();
        match body {
            Some(body) => self.module.fused.push(FusedDef { name: name.into(), body }),
            None => self.skip(&header)?,
        }
        Ok(())
    }

    /// `@name (…) {…}`, or `@name.a..b (…) {…}`, after `region`.
    fn region(&mut self) -> Parsed<()> {
        let (name, span) = self.symbol("the name of a region such as @embed")?;
        let first = RegionName::Named(name.into());
        if !self.c.eat("..") {
            return self.regions(span, vec![(None, first)]);
        }
        let Some((stem, start)) = first.numbered() else {
            let message = format!("a range begins with a number, as in @{}.0..3", shorten(name));
            return Err(Fail::name(span, message));
        };
        let end = self.end()?;
        if end > LAYERS as u64 {
            return Err(Fail::limit(span, format!("there are at most {LAYERS} regions of one name")));
        }
        let numbers = (u64::from(start)..end).filter_map(|i| u32::try_from(i).ok());
        let named = |i: u32| (Some(i), RegionName::Named(format!("{stem}.{i}").into()));
        let names = numbers.map(named).collect();
        self.regions(span, names)
    }

    /// Regions of one text, each with its number if it has one.
    fn regions(&mut self, span: Span, names: Vec<(Option<u32>, RegionName)>) -> Parsed<()> {
        let header = self.header()?;
        for (number, name) in names {
            if self.module.region(&name).is_some() {
                return Err(Fail::name(span, format!("region {name} is defined already")));
            }
            if self.module.regions.len() >= 2 * LAYERS {
                return Err(Fail::limit(span, "this module has too many regions"));
            }
            self.scope.enter(number);
            let made = self.instance(&header, name.clone());
            let made = if number.is_some() { made.map_err(|f| f.note(format!("in region {name}"))) } else { made };
            self.module.regions.extend(made?);
            self.scope.leave();
        }
        self.skip(&header)
    }

    /// The first layer of a range: digits, or a name.
    fn first(&mut self) -> Parsed<u64> {
        let (start, span) = self.symbol("a layer range such as @0..31")?;
        if start.bytes().all(|b| b.is_ascii_digit()) {
            return start.parse().map_err(|_| Fail::limit(span, format!("there are at most {LAYERS} layers")));
        }
        let mut inner = Cursor::new(start)?;
        let e = Expr::parse(&mut inner).map_err(|f| Fail { span, ..f })?;
        self.scope.whole(&e).map_err(|f| Fail { span, ..f })
    }

    /// The number after the last one of a range, which is read.
    fn end(&mut self) -> Parsed<u64> {
        let last = Expr::parse(&mut self.c)?;
        let value = self.scope.eval(&last)?;
        match value.as_i64().map(|n| n.saturating_add(1)) {
            Some(end) => Ok(u64::try_from(end).unwrap_or(0)),
            None => Err(Fail::value(last.span, format!("a number is needed here, this is {}", show(&value)))),
        }
    }

    /// `@a..b (…) {…}` after `layer`.
    fn layers(&mut self) -> Parsed<()> {
        let span = self.c.span();
        let first = self.first()?;
        let end = if self.c.eat("..") { self.end()? } else { first.saturating_add(1) };
        if end > LAYERS as u64 || self.module.layers() > LAYERS {
            return Err(Fail::limit(span, format!("there are at most {LAYERS} layers")));
        }
        let header = self.header()?;
        self.skip(&header)?;
        for i in first..end {
            let i = u32::try_from(i).map_err(|_| Fail::limit(span, "there is no such layer"))?;
            self.scope.enter(Some(i));
            let made = self.instance(&header, RegionName::Layer(i));
            if let Some(region) = made.map_err(|f| f.note(format!("in layer @{i}")))? {
                self.module.regions.push(region);
            }
            self.scope.leave();
        }
        self.skip(&header)
    }

    /// Puts the layers of neighbouring `layer` definitions in the order of their numbers: with `when`, one definition
    /// may give the even layers and the next one the odd ones.
    fn end_run(&mut self) -> Parsed<()> {
        let Some(start) = self.run.take() else { return Ok(()) };
        let mut sorted = BTreeMap::new();
        for region in self.module.regions.split_off(start) {
            let taken = sorted.contains_key(&region.name) || self.module.region(&region.name).is_some();
            if taken {
                let message = format!("layer {} is defined twice", region.name);
                return Err(Fail::name(self.c.before(), message));
            }
            sorted.insert(region.name.clone(), region);
        }
        self.module.regions.extend(sorted.into_values());
        Ok(())
    }
}
