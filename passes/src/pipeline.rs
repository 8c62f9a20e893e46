//! Pipelines as text: `name{key=value,flag},name,…`. They parse, print and round-trip; every error points into the
//! text.
//!
//! A value is a number, a word, a `"string"`, a list `[a,b]` or a map `{key=value}`; a key alone means `true`. Words
//! are runs of characters other than `, { } [ ] = "` and blanks; `true`, `false` and `null` mean what they say.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde_json::{Map, Number, Value as Json};

/// One pass of a pipeline, by name, with the options that the text sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// The pass.
    pub name: String,
    /// Options that differ from the defaults, in the order of the text.
    pub options: Map<String, Json>,
}

/// Passes in the order in which they run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pipeline {
    /// The passes.
    pub steps: Vec<Step>,
}

/// A pipeline that cannot be understood, with the place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PipelineError {
    /// The pipeline.
    pub text: String,
    /// The bytes of `text` that the message is about.
    pub span: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
}

impl fmt::Display for PipelineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.span.start.min(self.text.len());
        let before = self.text.get(..at).unwrap_or_default();
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = self.text.get(start..).and_then(|t| t.lines().next()).unwrap_or_default();
        let column = before.get(start..).unwrap_or_default().chars().count();
        let marked = self.text.get(self.span.clone()).and_then(|t| t.lines().next()).unwrap_or_default();
        let carets = marked.chars().count().max(1);
        writeln!(f, "{}", self.message)?;
        writeln!(f, "  {line}")?;
        write!(f, "  {}{}", " ".repeat(column), "^".repeat(carets))?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

impl Pipeline {
    /// The printed text, and where in it `step`, or one of its options, stands.
    fn locate(&self, step: usize, option: Option<&str>) -> (String, Range<usize>) {
        let (mut text, mut span) = (String::new(), 0..0);
        for (i, s) in self.steps.iter().enumerate() {
            if i > 0 {
                text.push(',');
            }
            let start = text.len();
            text.push_str(&s.name);
            if i == step {
                span = start..text.len();
            }
            if !s.options.is_empty() {
                text.push('{');
                for (j, (key, value)) in s.options.iter().enumerate() {
                    if j > 0 {
                        text.push(',');
                    }
                    let start = text.len();
                    print_option(&mut text, key, value);
                    if i == step && option == Some(key) {
                        span = start..text.len();
                    }
                }
                text.push('}');
            }
        }
        (text, span)
    }

    /// An error about a step, or about one of its options.
    pub fn error(&self, step: usize, option: Option<&str>, message: String, help: Option<String>) -> PipelineError {
        let (text, span) = self.locate(step, option);
        PipelineError { text, span, message, help }
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.locate(usize::MAX, None).0)
    }
}

fn print_option(out: &mut String, key: &str, value: &Json) {
    out.push_str(key);
    if *value != Json::Bool(true) {
        out.push('=');
        print_value(out, value);
    }
}

fn print_value(out: &mut String, value: &Json) {
    match value {
        Json::String(s) if !s.is_empty() && s.chars().all(in_word) && !s.starts_with('-') && word(s) == *value => {
            out.push_str(s)
        }
        // Rust's own form of a float is the shortest that reads back the same.
        Json::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
            Some(float) => out.push_str(&format!("{float:?}")),
            None => out.push_str(&n.to_string()),
        },
        Json::Null | Json::Bool(_) | Json::String(_) => out.push_str(&value.to_string()),
        Json::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                print_value(out, item);
            }
            out.push(']');
        }
        Json::Object(map) => {
            out.push('{');
            for (i, (key, value)) in map.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                print_option(out, key, value);
            }
            out.push('}');
        }
    }
}

fn in_word(c: char) -> bool {
    !matches!(c, ',' | '{' | '}' | '[' | ']' | '=' | '"' | '\\') && !c.is_whitespace() && !c.is_control()
}

/// What a bare word stands for.
fn word(text: &str) -> Json {
    match text {
        "true" => return Json::Bool(true),
        "false" => return Json::Bool(false),
        "null" => return Json::Null,
        _ => {}
    }
    // `parse` also takes `inf` and `nan`: those are words here.
    if text.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit()) {
        let integer = text.parse::<i64>().map(Number::from).or_else(|_| text.parse::<u64>().map(Number::from));
        let number = integer.ok().or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64));
        if let Some(number) = number {
            return Json::Number(number);
        }
    }
    Json::String(text.to_owned())
}

impl FromStr for Pipeline {
    type Err = PipelineError;

    fn from_str(text: &str) -> Result<Self, PipelineError> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let mut steps = Vec::new();
        parser.blanks();
        while !parser.done() {
            let name = parser.word("the name of a pass")?;
            let options = if parser.eat('{') { parser.options()? } else { Map::new() };
            steps.push(Step { name, options });
            if parser.done() {
                break;
            }
            if !parser.eat(',') {
                return Err(parser.expected("`,` or the end"));
            }
            if parser.done() {
                return Err(parser.expected("the name of a pass"));
            }
        }
        Ok(Self { steps })
    }
}

/// How deep lists and maps may nest: more than any option needs, and little enough for the stack.
const MAX_DEPTH: usize = 32;

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn done(&self) -> bool {
        self.rest().is_empty()
    }

    fn eat(&mut self, c: char) -> bool {
        let found = self.rest().starts_with(c);
        if found {
            self.at += c.len_utf8();
            self.blanks();
        }
        found
    }

    fn expected(&self, what: &str) -> PipelineError {
        let found = self.rest().chars().next();
        let message = match found {
            Some(c) => format!("expected {what}, found `{c}`"),
            None => format!("expected {what}, found the end"),
        };
        let span = self.at..self.at + found.map_or(0, char::len_utf8);
        let help = "a pipeline is written name{key=value,flag},name,…".to_owned();
        PipelineError { text: self.text.to_owned(), span, message, help: Some(help) }
    }

    fn word(&mut self, what: &str) -> Result<String, PipelineError> {
        let rest = self.rest();
        let len = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
        let found = rest.get(..len).unwrap_or_default().to_owned();
        if found.is_empty() {
            return Err(self.expected(what));
        }
        self.at += len;
        self.blanks();
        Ok(found)
    }

    /// The options after an opening brace, the closing one included.
    fn options(&mut self) -> Result<Map<String, Json>, PipelineError> {
        let mut map = Map::new();
        if self.eat('}') {
            return Ok(map);
        }
        loop {
            let start = self.at;
            let key = self.word("an option")?;
            let value = if self.eat('=') { self.value()? } else { Json::Bool(true) };
            let message = format!("option `{key}` is set twice");
            let span = start..start + key.len();
            if map.insert(key, value).is_some() {
                return Err(PipelineError { text: self.text.to_owned(), span, message, help: None });
            }
            if self.eat('}') {
                return Ok(map);
            }
            if !self.eat(',') {
                return Err(self.expected("`,` or `}`"));
            }
        }
    }

    fn value(&mut self) -> Result<Json, PipelineError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.expected("fewer nested brackets"));
        }
        let value = if self.eat('[') {
            self.list()?
        } else if self.eat('{') {
            Json::Object(self.options()?)
        } else if self.rest().starts_with('"') {
            self.string()?
        } else {
            word(&self.word("a value")?)
        };
        self.depth -= 1;
        Ok(value)
    }

    fn list(&mut self) -> Result<Json, PipelineError> {
        let mut items = Vec::new();
        if self.eat(']') {
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value()?);
            if self.eat(']') {
                return Ok(Json::Array(items));
            }
            if !self.eat(',') {
                return Err(self.expected("`,` or `]`"));
            }
        }
    }

    /// A JSON string.
    fn string(&mut self) -> Result<Json, PipelineError> {
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<String>();
        match stream.next() {
            Some(Ok(s)) => {
                self.at += stream.byte_offset();
                self.blanks();
                Ok(Json::String(s))
            }
            Some(Err(_)) | None => {
                let span = self.at..self.text.len();
                let message = "this string does not end, or has a bad escape".to_owned();
                Err(PipelineError { text: self.text.to_owned(), span, message, help: None })
            }
        }
    }
}

/// The candidate nearest to `name`, if one is near enough to be meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = name.chars().count().div_ceil(3).max(1);
    let scored = candidates.into_iter().map(|c| (distance(name, c), c));
    scored.filter(|(d, _)| *d <= limit).min_by_key(|(d, _)| *d).map(|(_, c)| c)
}

/// Levenshtein distance: insertions, deletions and substitutions of characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut corner = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let best = (corner + usize::from(ca != *cb)).min(*cell + 1).min(left + 1);
            corner = std::mem::replace(cell, best);
            left = best;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Pipeline {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn options_of_every_kind() {
        let p = parse(
            "profile{from=out/stats.safetensors, n=-3} , quantize{bits=4,eps=1e-5,sym,on=false,a=\"x y\",l=[1,[b]]}\n,dce",
        );
        assert_eq!(p.steps.len(), 3);
        assert_eq!(Json::Object(p.steps[0].options.clone()), json!({"from": "out/stats.safetensors", "n": -3}));
        let want = json!({"bits": 4, "eps": 1e-5, "sym": true, "on": false, "a": "x y", "l": [1, ["b"]]});
        assert_eq!(Json::Object(p.steps[1].options.clone()), want);
        let printed =
            "profile{from=out/stats.safetensors,n=-3},quantize{bits=4,eps=1e-5,sym,on=false,a=\"x y\",l=[1,[b]]},dce";
        assert_eq!(p.to_string(), printed);
        assert_eq!(parse("").steps, []);
    }

    #[test]
    fn errors_point_into_the_text() {
        let error = |text: &str| text.parse::<Pipeline>().unwrap_err().to_string();
        assert_eq!(
            error("dce,quantize{bits=}"),
            "expected a value, found `}`\n  dce,quantize{bits=}\n                    ^\nhelp: a pipeline is written name{key=value,flag},name,…"
        );
        assert!(error("dce,").contains("expected the name of a pass, found the end"));
        assert!(error("a b").contains("found `b`"));
        assert!(error("a{b=\"x").contains("does not end"));
        assert!(error("a{b,b}").contains("`b` is set twice\n  a{b,b}\n      ^"));
        assert!(error(&format!("a{{b={}", "[".repeat(1000))).contains("fewer nested brackets"));
        // Not in the first line, and after characters of several bytes.
        assert!(
            error("dce,\n  é{=}")
                .ends_with("    é{=}\n      ^\nhelp: a pipeline is written name{key=value,flag},name,…")
        );
    }

    #[test]
    fn nearest_name() {
        let names = ["fuse-rope", "fuse-norm", "dce"];
        assert_eq!(nearest("fuse-rop", names), Some("fuse-rope"));
        assert_eq!(nearest("fuse_norm", names), Some("fuse-norm"));
        assert_eq!(nearest("quantize", names), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    fn value() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            any::<f64>().prop_map(|f| Number::from_f64(f).map_or(Json::Null, Json::Number)),
            any::<String>().prop_map(Json::from),
            "[a-z0-9.+-]{1,6}".prop_map(Json::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Json::Array);
            let map =
                prop::collection::vec(("[a-z_]{1,8}", inner), 0..4).prop_map(|m| Json::Object(m.into_iter().collect()));
            prop_oneof![list, map]
        })
    }

    proptest! {
        #[test]
        fn print_then_parse(steps in prop::collection::vec(("[a-z][a-z0-9-]{0,10}", prop::collection::vec(("[a-z_]{1,8}", value()), 0..4)), 0..5)) {
            let steps = steps.into_iter().map(|(name, options)| Step { name, options: options.into_iter().collect() }).collect();
            let pipeline = Pipeline { steps };
            prop_assert_eq!(pipeline.to_string().parse::<Pipeline>(), Ok(pipeline));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,40}|[a-z{}\\[\\]=,\" 0-9]{0,40}") {
            if let Err(e) = text.parse::<Pipeline>() {
                prop_assert!(e.span.end <= text.len());
                prop_assert!(e.to_string().contains('^'));
            }
        }
    }
}
