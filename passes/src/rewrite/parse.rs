//! The text of rules, as users write it in a file:
//!
//! ```text
//! // Comments, as in IR text.
//! rewrite "swiglu" {
//!   match   { %g, %u = split %gu
//!             %s = silu %g
//!             %m = mul %s, %u }
//!   where   same_type(%g, %u)
//!   produce { %m = fused @swiglu(%gu) }
//! }
//! ```

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use awqc_ir::text::{Callee, FragmentLine, FragmentOperand, NoEnv, parse_fragment_with};
use awqc_ir::{Diagnostic, Diagnostics, Op, OpError, Place, Span};

use super::rule::{Guard, Line, Make, Produce, Rule, Term};
use super::variables::{Unmatched, variables};

/// The rules of a text, in order.
///
/// # Errors
/// `R01` for the form of a rule and for a rule that does not hold together, `P01` and `P02` for the lines in it, each
/// with its place.
pub fn parse_rules(text: &str) -> Result<Vec<Rule>, Diagnostics> {
    let blanked = without_comments(text);
    let mut parser = Parser { text: &blanked, at: 0 };
    let mut rules: Vec<Rule> = Vec::new();
    let mut wrong = Vec::new();
    parser.blanks();
    while !parser.rest().is_empty() {
        let start = parser.at;
        let rule = parser.rule().map_err(|d| shown_in(text, d))?;
        let span = Span { start, end: start + "rewrite".len() };
        if let Err(why) = rule.check() {
            wrong.extend(fail(span, format!("rewrite \"{}\": {why}", rule.name)).0);
        }
        if rules.iter().any(|r| r.name == rule.name) {
            wrong.extend(fail(span, format!("there are two rewrites \"{}\"", rule.name)).0);
        }
        rules.push(rule);
    }
    if wrong.is_empty() { Ok(rules) } else { Err(shown_in(text, Diagnostics(wrong))) }
}

/// The text with comments blanked out, so that places stay what they are.
fn without_comments(text: &str) -> String {
    let blank = |line: &str| match line.find("//") {
        Some(at) => {
            let (code, comment) = line.split_at(at);
            let end = if comment.ends_with('\n') { "\n" } else { "" };
            format!("{code}{}{end}", " ".repeat(comment.len() - end.len()))
        }
        None => line.to_owned(),
    };
    text.split_inclusive('\n').map(blank).collect()
}

fn fail(span: Span, message: String) -> Diagnostics {
    let mut d = Diagnostic::new("R01", message);
    d.place = Some(Place::line(&Arc::from(""), span));
    Diagnostics(vec![d])
}

/// The diagnostics with their places in the text as the user wrote it.
fn shown_in(text: &str, mut all: Diagnostics) -> Diagnostics {
    let text: Arc<str> = text.into();
    for place in all.0.iter_mut().filter_map(|d| d.place.as_mut()) {
        place.text = text.clone();
    }
    all
}

/// The lines between two braces.
#[derive(Default)]
struct Block {
    /// The whole text up to the end of the block, without what only rules have.
    text: String,
    lines: Vec<FragmentLine>,
    /// `%old = %new`.
    aliases: Vec<(String, String)>,
    /// Weights written `$name?`.
    optional: BTreeSet<String>,
}

impl Block {
    fn terms(&self, line: &FragmentLine) -> Vec<Term> {
        let term = |o: &FragmentOperand| match o {
            FragmentOperand::Value(name) => Term::Value(name.clone()),
            FragmentOperand::Weight(name) => {
                Term::Weight { name: name.clone(), optional: self.optional.contains(name) }
            }
        };
        line.operands.iter().map(term).collect()
    }

    fn line(&self, text: &str, line: &FragmentLine, mnemonic: &str) -> Line {
        Line {
            text: text
                .get(line.span.start..line.span.end)
                .unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
            results: line.results.clone(),
            mnemonic: mnemonic.to_owned(),
            operands: self.terms(line),
            attributes: line.attributes.clone(),
        }
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn here(&self) -> Span {
        Span { start: self.at, end: self.at + self.rest().chars().next().map_or(0, char::len_utf8) }
    }

    fn expected<T>(&self, what: &str) -> Result<T, Diagnostics> {
        let found = match self.rest().chars().next() {
            Some(c) => format!("`{c}`"),
            None => "the end".into(),
        };
        Err(fail(self.here(), format!("expected {what}, found {found}")))
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
            self.blanks();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<(), Diagnostics> {
        if self.eat(token) { Ok(()) } else { self.expected(&format!("`{token}`")) }
    }

    fn word(&mut self, what: &str) -> Result<&'t str, Diagnostics> {
        match self.rest().get(..word_len(self.rest())) {
            Some(word) if !word.is_empty() => {
                self.at += word.len();
                self.blanks();
                Ok(word)
            }
            Some(_) | None => self.expected(what),
        }
    }

    fn value(&mut self) -> Result<String, Diagnostics> {
        if !self.rest().starts_with('%') {
            return self.expected("a value such as `%x`");
        }
        self.at += 1;
        self.word("a name").map(str::to_owned)
    }

    fn rule(&mut self) -> Result<Rule, Diagnostics> {
        self.expect("rewrite")?;
        if !self.rest().starts_with('"') {
            return self.expected("the name of the rewrite in quotes");
        }
        self.at += 1;
        let name = match self.rest().split_once('"') {
            Some((name, _)) if !name.is_empty() && !name.contains('\n') => name.to_owned(),
            Some(_) | None => return self.expected("a name and a closing quote"),
        };
        self.at += name.len() + 1;
        self.blanks();
        self.expect("{")?;
        self.expect("match")?;
        let pattern = self.block(&NoEnv)?;
        if let Some((old, _)) = pattern.aliases.first() {
            return Err(fail(self.here(), format!("`%{old} = …` in `match` needs an op")));
        }
        let mut lines = Vec::new();
        for line in &pattern.lines {
            match &line.callee {
                Callee::Op(mnemonic) => lines.push(pattern.line(self.text, line, mnemonic)),
                Callee::Fused(_) => {
                    return Err(fail(line.span, "a fused op cannot be matched; match its body instead".into()));
                }
            }
        }
        let mut guards = Vec::new();
        if self.eat("where") {
            guards.push(self.guard()?);
            while self.eat(",") {
                guards.push(self.guard()?);
            }
        }
        self.expect("produce")?;
        let produce = self.block(&Unmatched)?;
        self.expect("}")?;
        Ok(Rule { name, lines, guards, produce: self.produce(produce)? })
    }

    fn guard(&mut self) -> Result<Guard, Diagnostics> {
        let span = self.here();
        let name = self.word("a guard: single_use(%v), same_type(%a, %b), without(%v, key) or holds(condition)")?;
        self.expect("(")?;
        if name == "holds" {
            return self.condition();
        }
        let first = self.value()?;
        let guard = match name {
            "single_use" => Guard::SingleUse(first),
            "same_type" => {
                self.expect(",")?;
                Guard::SameType(first, self.value()?)
            }
            "without" => {
                self.expect(",")?;
                Guard::Without(first, self.word("an attribute")?.to_owned())
            }
            other => {
                return Err(fail(
                    span,
                    format!(
                        "there is no guard `{other}`; known: single_use(%v), same_type(%a, %b), without(%v, key), holds(condition)"
                    ),
                ));
            }
        };
        self.expect(")")?;
        Ok(guard)
    }

    /// The rest of `holds(condition)`.
    fn condition(&mut self) -> Result<Guard, Diagnostics> {
        let text = self.until(['(', ')'])?;
        let guard = Guard::Holds(text.trim().to_owned());
        self.at += text.len();
        self.expect(")")?;
        Ok(guard)
    }

    /// The text up to the bracket that closes the one just read, which stays.
    fn until(&mut self, [open, close]: [char; 2]) -> Result<&'t str, Diagnostics> {
        let mut depth = 1usize;
        let closes = |c: char| {
            depth = depth + usize::from(c == open) - usize::from(c == close);
            depth == 0
        };
        let found = self.rest().find(closes).and_then(|len| self.rest().get(..len));
        if found.is_none() {
            self.at = self.text.len();
        }
        found.map_or_else(|| self.expected(&format!("`{close}`")), Ok)
    }

    /// `{ lines }`, read by the parser of IR text, but for aliases and the question marks of optional weights.
    fn block(&mut self, env: &dyn awqc_ir::text::Env) -> Result<Block, Diagnostics> {
        self.expect("{")?;
        let start = self.at;
        let text = self.until(['{', '}'])?;
        let len = text.len();
        let mut block = Block::default();
        let mut inner = text.as_bytes().to_vec();
        for mark in self.optional(start..start + len, &mut block) {
            inner[mark - start] = b' ';
        }
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            if let Some(alias) = alias(line) {
                block.aliases.push(alias);
                inner[at..at + line.len()].fill(b' ');
            }
            at += line.len();
        }
        // Blanks up to the block, so that places are those of the whole text.
        let mut padded: Vec<u8> = self.text.bytes().take(start).map(|b| if b == b'\n' { b } else { b' ' }).collect();
        padded.extend(inner);
        block.text = String::from_utf8_lossy(&padded).into_owned();
        block.lines = parse_fragment_with(&block.text, env)?.lines;
        self.at = start + len;
        self.expect("}")?;
        Ok(block)
    }

    /// Notes the optional weights in `range` of the text and returns where their question marks stand.
    fn optional(&self, range: Range<usize>, block: &mut Block) -> Vec<usize> {
        let text = self.text.get(range.clone()).unwrap_or_default();
        let mut marks = Vec::new();
        for (at, _) in text.match_indices('$') {
            let rest = text.get(at + 1..).unwrap_or_default();
            let len = word_len(rest);
            if rest.get(len..).is_some_and(|t| t.starts_with('?')) {
                block.optional.insert(rest.get(..len).unwrap_or_default().to_owned());
                marks.push(range.start + at + 1 + len);
            }
        }
        marks
    }

    fn produce(&self, block: Block) -> Result<Produce, Diagnostics> {
        let mut ops = Vec::new();
        for line in &block.lines {
            match &line.callee {
                Callee::Op(mnemonic) => {
                    let text = block.text.get(line.span.start..line.span.end).unwrap_or_default();
                    let make = if variables(text).is_empty() {
                        let op = Op::from_attributes(mnemonic, line.attributes.clone());
                        Make::Op(op.map_err(|OpError(e)| fail(line.span, e))?)
                    } else {
                        Make::Text(text.to_owned())
                    };
                    ops.push((block.line(self.text, line, mnemonic), make));
                }
                Callee::Fused(kernel) if block.lines.len() == 1 && block.aliases.is_empty() => {
                    if !line.attributes.is_empty() {
                        return Err(fail(
                            line.span,
                            "a fused op has no attributes: the matched ops keep theirs".into(),
                        ));
                    }
                    let results = line.results.clone();
                    return Ok(Produce::Outline { kernel: kernel.clone(), operands: block.terms(line), results });
                }
                Callee::Fused(_) => {
                    return Err(fail(line.span, "a rewrite produces one fused op, or other ops".into()));
                }
            }
        }
        Ok(Produce::Replace { ops, aliases: block.aliases })
    }
}

fn word_len(text: &str) -> usize {
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(text.len())
}

/// `%old = %new`, alone on its line.
fn alias(line: &str) -> Option<(String, String)> {
    let (old, new) = line.split_once('=')?;
    let name = |t: &str| {
        let name = t.trim().strip_prefix('%')?;
        (!name.is_empty() && word_len(name) == name.len()).then(|| name.to_owned())
    };
    Some((name(old)?, name(new)?))
}
