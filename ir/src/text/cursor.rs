//! The parser's place in the token list, and the failures that it reports.

use std::sync::Arc;

use crate::diag::{Diagnostic, Diagnostics, Place, Span};

use super::lex::{Tok, Token, lex};

/// Nesting of brackets that the parser follows; the same bound holds for the terms that it builds.
pub(crate) const DEPTH: usize = 64;

/// Why parsing stopped.
#[derive(Clone, Debug)]
pub(super) struct Fail {
    pub(super) code: &'static str,
    pub(super) span: Span,
    pub(super) message: String,
    pub(super) notes: Vec<String>,
}

impl Fail {
    fn new(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self { code, span, message: message.into(), notes: Vec::new() }
    }

    /// The text does not have the form of the language.
    pub(super) fn syntax(span: Span, message: impl Into<String>) -> Self {
        Self::new("P01", span, message)
    }

    /// A name that is unknown, or known already.
    pub(super) fn name(span: Span, message: impl Into<String>) -> Self {
        Self::new("P02", span, message)
    }

    /// Types, shapes or attributes that do not fit.
    pub(super) fn ty(span: Span, message: impl Into<String>) -> Self {
        Self::new("P03", span, message)
    }

    /// An expression that has no value, or a requirement that does not hold.
    pub(super) fn value(span: Span, message: impl Into<String>) -> Self {
        Self::new("P04", span, message)
    }

    /// A text that is larger than the parser goes along with.
    pub(super) fn limit(span: Span, message: impl Into<String>) -> Self {
        Self::new("P05", span, message)
    }

    pub(super) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// The diagnostic for a failure in `text`.
    pub(super) fn report(self, text: &str) -> Diagnostics {
        let text: Arc<str> = text.into();
        let mut d = Diagnostic::new(self.code, self.message);
        d.place = Some(Place::line(&text, self.span));
        d.notes = self.notes;
        d.into()
    }
}

pub(super) type Parsed<T> = Result<T, Fail>;

/// The parser's place in a text.
pub(super) struct Cursor<'t> {
    tokens: Vec<Token<'t>>,
    /// Index of the next token; going back is setting it.
    pub(super) at: usize,
    depth: usize,
}

impl<'t> Cursor<'t> {
    pub(super) fn new(text: &'t str) -> Parsed<Self> {
        Ok(Self { tokens: lex(text)?, at: 0, depth: 0 })
    }

    /// The next token.
    pub(super) fn peek(&self) -> Tok<'t> {
        self.ahead(0)
    }

    /// The token `n` after the next.
    pub(super) fn ahead(&self, n: usize) -> Tok<'t> {
        self.tokens.get(self.at.saturating_add(n)).map_or(Tok::End, |t| t.tok)
    }

    /// Where the next token stands.
    pub(super) fn span(&self) -> Span {
        self.tokens.get(self.at).or(self.tokens.last()).map(|t| t.span).unwrap_or_default()
    }

    /// Where the token before the next stands.
    pub(super) fn before(&self) -> Span {
        self.at.checked_sub(1).and_then(|i| self.tokens.get(i)).map(|t| t.span).unwrap_or_default()
    }

    /// Takes the next token.
    pub(super) fn next(&mut self) -> (Tok<'t>, Span) {
        let taken = (self.peek(), self.span());
        self.at = (self.at + 1).min(self.tokens.len().saturating_sub(1));
        taken
    }

    pub(super) fn is(&self, punct: &str) -> bool {
        matches!(self.peek(), Tok::Punct(p) if p == punct)
    }

    pub(super) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Tok::Word(w) if w == word)
    }

    /// Takes the next token if it is this one.
    pub(super) fn eat(&mut self, punct: &str) -> bool {
        let found = self.is(punct);
        if found {
            self.next();
        }
        found
    }

    /// Takes the next token if it is this word.
    pub(super) fn eat_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.next();
        }
        found
    }

    /// The failure that something else was expected here.
    pub(super) fn expected(&self, what: &str) -> Fail {
        Fail::syntax(self.span(), format!("{what} is expected here, not {}", self.peek()))
    }

    pub(super) fn expect(&mut self, punct: &'static str) -> Parsed<Span> {
        if self.is(punct) { Ok(self.next().1) } else { Err(self.expected(&format!("`{punct}`"))) }
    }

    pub(super) fn expect_word(&mut self, word: &'static str) -> Parsed<Span> {
        if self.is_word(word) { Ok(self.next().1) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    pub(super) fn word(&mut self, what: &str) -> Parsed<(&'t str, Span)> {
        match self.peek() {
            Tok::Word(w) => Ok((w, self.next().1)),
            _ => Err(self.expected(what)),
        }
    }

    pub(super) fn string(&mut self, what: &str) -> Parsed<(&'t str, Span)> {
        match self.peek() {
            Tok::Str(s) => Ok((s, self.next().1)),
            _ => Err(self.expected(what)),
        }
    }

    /// A number without sign, fraction and exponent.
    pub(super) fn int(&mut self, what: &str) -> Parsed<u64> {
        match self.peek() {
            Tok::Int(n) => {
                self.next();
                Ok(n)
            }
            _ => Err(self.expected(what)),
        }
    }

    /// `f`, one level of brackets further in.
    pub(super) fn nested<T>(&mut self, f: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth >= DEPTH {
            return Err(Fail::limit(self.span(), format!("this nests deeper than {DEPTH} levels")));
        }
        self.depth += 1;
        let out = f(self);
        self.depth -= 1;
        out
    }

    /// `item`s between commas, up to the closing token, which is taken. A last comma may stand.
    pub(super) fn list<T>(
        &mut self,
        close: &'static str,
        mut item: impl FnMut(&mut Self) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        let mut out = Vec::new();
        while !self.eat(close) {
            out.push(item(self)?);
            if !self.is(close) {
                self.expect(",").map_err(|_| self.expected(&format!("`,` or `{close}`")))?;
            }
        }
        Ok(out)
    }
}
