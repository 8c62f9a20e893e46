//! Diagnostics: what is wrong, where, and what to do, rendered as plain text under the offending place.
//!
//! A diagnostic has a stable code: `P..` for the text form, `V..` for the verifier. It points into a text, either the
//! one that was parsed or the printed form of the region that was verified.

use std::fmt;
use std::sync::Arc;

/// A range of bytes of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// From the start of `self` to the end of `other`.
    #[must_use]
    pub fn to(self, other: Span) -> Span {
        Span { start: self.start, end: other.end.max(self.start) }
    }
}

/// How much of its text a diagnostic shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// The line.
    Line,
    /// The whole text, with carets under every offending line.
    All,
}

/// A place in a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The text.
    pub text: Arc<str>,
    /// The offending part of it.
    pub span: Span,
    /// How much is shown.
    pub show: Show,
}

impl Place {
    /// A place in a text that was parsed.
    pub fn line(text: &Arc<str>, span: Span) -> Self {
        Self { text: text.clone(), span, show: Show::Line }
    }

    /// Line number and column, counted from 1, and the line's text.
    pub fn locate(&self) -> (usize, usize, &str) {
        let start = floor_boundary(&self.text, self.span.start);
        let head = self.text.get(..start).unwrap_or("");
        let line = head.matches('\n').count() + 1;
        let begin = head.rfind('\n').map_or(0, |n| n + 1);
        let rest = self.text.get(begin..).unwrap_or("");
        let source = rest.split('\n').next().unwrap_or("").trim_end_matches('\r');
        (line, head.get(begin..).unwrap_or("").chars().count() + 1, source)
    }
}

fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// Stable: `P02`, `V07`, …
    pub code: &'static str,
    /// What is wrong, in one sentence.
    pub message: String,
    /// Where, if the text is known.
    pub place: Option<Place>,
    /// What else helps: what was expected, what to do.
    pub notes: Vec<String>,
}

/// The widest part of a source line that is shown.
const WIDTH: usize = 160;

impl Diagnostic {
    /// A diagnostic without a place and notes.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), place: None, notes: Vec::new() }
    }

    /// The line number, counted from 1.
    pub fn line(&self) -> Option<usize> {
        self.place.as_ref().map(|p| p.locate().0)
    }

    /// The line, a caret line under it, each with the gutter `margin` wide.
    fn caret(&self, f: &mut fmt::Formatter<'_>, place: &Place, margin: usize) -> fmt::Result {
        let (line, column, source) = place.locate();
        let chars: Vec<char> = source.chars().collect();
        let from = if chars.len() > WIDTH { (column - 1).saturating_sub(WIDTH / 2) } else { 0 };
        let shown: String =
            chars.iter().skip(from).take(WIDTH).map(|c| if c.is_control() { ' ' } else { *c }).collect();
        let end = floor_boundary(&place.text, place.span.end.max(place.span.start));
        let start = floor_boundary(&place.text, place.span.start);
        let marked = place.text.get(start..end).unwrap_or("").split('\n').next().unwrap_or("").chars().count();
        let len = marked.clamp(1, WIDTH.saturating_sub(column - 1 - from).max(1));
        writeln!(f, "{line:>margin$} | {shown}")?;
        write!(f, "{:margin$} | {:pad$}{}", "", "", "^".repeat(len), pad = column - 1 - from)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message)?;
        if let Some(place) = &self.place {
            let (line, column, _) = place.locate();
            let margin = line.to_string().len();
            writeln!(f, "\n{:margin$}--> line {line}, column {column}", "")?;
            self.caret(f, place, margin)?;
        }
        for note in &self.notes {
            write!(f, "\n  = {note}")?;
        }
        Ok(())
    }
}

/// One or more diagnostics, in the order of the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each diagnostic.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.0.iter()
    }

    /// The codes, in order.
    pub fn codes(&self) -> Vec<&'static str> {
        self.0.iter().map(|d| d.code).collect()
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(diagnostic: Diagnostic) -> Self {
        Self(vec![diagnostic])
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl std::error::Error for Diagnostics {}

impl fmt::Display for Diagnostics {
    /// Diagnostics that show the whole of one text share one listing of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        let mut first = true;
        while let Some(head) = rest.first() {
            if !std::mem::take(&mut first) {
                f.write_str("\n\n")?;
            }
            let listed = match &head.place {
                Some(place) if place.show == Show::All => {
                    let same =
                        |d: &Diagnostic| d.place.as_ref().is_some_and(|p| p.show == Show::All && p.text == place.text);
                    rest.iter().take_while(|d| same(d)).count()
                }
                Some(_) | None => 0,
            };
            if listed == 0 {
                write!(f, "{head}")?;
                rest = &rest[1..];
            } else {
                listing(f, &rest[..listed])?;
                rest = &rest[listed..];
            }
        }
        Ok(())
    }
}

fn listing(f: &mut fmt::Formatter<'_>, all: &[Diagnostic]) -> fmt::Result {
    let Some(text) = all.first().and_then(|d| d.place.as_ref()).map(|p| p.text.clone()) else { return Ok(()) };
    for (i, line) in text.lines().enumerate() {
        if i > 0 {
            writeln!(f)?;
        }
        write!(f, "{line}")?;
        for d in all {
            let Some(place) = &d.place else { continue };
            let (at, column, source) = place.locate();
            if at == i + 1 {
                let room = source.chars().count().saturating_sub(column - 1).max(1);
                let len = place.span.end.saturating_sub(place.span.start).clamp(1, room);
                write!(f, "\n{:pad$}{}", "", "^".repeat(len), pad = column - 1)?;
                write!(f, "\n; error[{}]: {}", d.code, d.message)?;
                for note in &d.notes {
                    write!(f, "\n;   {note}")?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caret_stands_under_the_place() {
        let text: Arc<str> = "one\ntwo three\nfour".into();
        let mut d = Diagnostic::new("P01", "three is one too many");
        d.place = Some(Place::line(&text, Span { start: 8, end: 13 }));
        d.notes.push("say two".into());
        let want =
            "error[P01]: three is one too many\n --> line 2, column 5\n2 | two three\n  |     ^^^^^\n  = say two";
        assert_eq!(d.to_string(), want);
        assert_eq!(d.line(), Some(2));
    }

    #[test]
    fn a_place_past_the_end_and_inside_a_character_is_shown() {
        let text: Arc<str> = "aé".into();
        for (start, end) in [(2, 2), (3, 9), (90, 99)] {
            let mut d = Diagnostic::new("P01", "x");
            d.place = Some(Place::line(&text, Span { start, end }));
            assert!(d.to_string().contains("line 1"));
        }
    }

    #[test]
    fn diagnostics_of_one_listing_are_shown_in_it() {
        let text: Arc<str> = "a\nb\nc".into();
        let at = |code, start| {
            let mut d = Diagnostic::new(code, "bad");
            d.place = Some(Place { text: text.clone(), span: Span { start, end: start + 1 }, show: Show::All });
            d
        };
        let all = Diagnostics(vec![at("V01", 0), at("V02", 4)]);
        assert_eq!(all.to_string(), "a\n^\n; error[V01]: bad\nb\nc\n^\n; error[V02]: bad");
        assert_eq!(all.codes(), ["V01", "V02"]);
    }
}
