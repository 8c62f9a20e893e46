//! Text to tokens. Four sigils tell names apart: `%` value, `$` weight, `#` data, `@` symbol.
//!
//! White space and line ends separate tokens and mean nothing else; `//` starts a comment. A `%` that a name follows
//! directly is a value, so the remainder of a division is written with a space: `a % b`.

use crate::diag::Span;

use super::Fail;

/// A token of a text that lives as long as `'t`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tok<'t> {
    /// A word: `[A-Za-z_][A-Za-z0-9_]*`.
    Word(&'t str),
    /// A number without fraction or exponent.
    Int(u64),
    /// A number with one.
    Float(f64),
    /// The inside of a string, escapes untouched.
    Str(&'t str),
    /// `%name`.
    Value(&'t str),
    /// `$name`.
    Weight(&'t str),
    /// `#name`.
    Data(&'t str),
    /// `@name`.
    At(&'t str),
    /// Anything else: `=`, `..`, `??`, …
    Punct(&'static str),
    /// The end.
    End,
}

impl std::fmt::Display for Tok<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Tok::Word(w) => write!(f, "`{}`", shorten(w)),
            Tok::Int(n) => write!(f, "`{n}`"),
            Tok::Float(x) => write!(f, "`{x:?}`"),
            Tok::Str(_) => f.write_str("a string"),
            Tok::Value(n) => write!(f, "`%{}`", shorten(n)),
            Tok::Weight(n) => write!(f, "`${}`", shorten(n)),
            Tok::Data(n) => write!(f, "`#{}`", shorten(n)),
            Tok::At(n) => write!(f, "`@{}`", shorten(n)),
            Tok::Punct(p) => write!(f, "`{p}`"),
            Tok::End => f.write_str("the end of the text"),
        }
    }
}

/// A name that fits into a message.
pub(super) fn shorten(name: &str) -> &str {
    name.char_indices().nth(60).map_or(name, |(at, _)| &name[..at])
}

/// A token and its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'t> {
    pub(super) tok: Tok<'t>,
    pub(super) span: Span,
}

/// Longest first, so that `==` is not two `=`.
const PUNCTUATION: [&str; 24] = [
    "..", "??", "==", "!=", "<=", ">=", "=", ":", ",", "(", ")", "{", "}", "[", "]", ".", "?", "+", "-", "*", "/", "%",
    "<", ">",
];

fn is_name(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

/// Whether `s` is a word of the language.
pub(crate) fn is_word(s: &str) -> bool {
    s.bytes().all(is_name) && s.bytes().next().is_some_and(|b| !b.is_ascii_digit())
}

/// Whether `s` can follow a sigil.
pub(crate) fn is_sigil_name(s: &str) -> bool {
    !s.is_empty() && name_len(s.as_bytes()) == s.len()
}

/// The length of the name at the start of `bytes`: letters, digits, `_`, and `.` between them.
fn name_len(bytes: &[u8]) -> usize {
    let mut n = 0;
    while let Some(b) = bytes.get(n) {
        let dot = *b == b'.' && n > 0 && bytes.get(n + 1).copied().is_some_and(is_name);
        if !is_name(*b) && !dot {
            break;
        }
        n += 1;
    }
    n
}

/// Splits a text into tokens; the last is [`Tok::End`].
pub(super) fn lex(text: &str) -> Result<Vec<Token<'_>>, Fail> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&b) = bytes.get(at) {
        let rest = &bytes[at..];
        let len = match b {
            b' ' | b'\t' | b'\r' | b'\n' => {
                at += 1;
                continue;
            }
            b'/' if rest.get(1) == Some(&b'/') => {
                at += rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
                continue;
            }
            b'%' | b'$' | b'#' | b'@' if rest.get(1).copied().is_some_and(is_name) => {
                let len = 1 + name_len(&rest[1..]);
                let name = &text[at + 1..at + len];
                let tok = match b {
                    b'%' => Tok::Value(name),
                    b'$' => Tok::Weight(name),
                    b'#' => Tok::Data(name),
                    _ => Tok::At(name),
                };
                tokens.push(Token { tok, span: Span { start: at, end: at + len } });
                len
            }
            b'"' => {
                let len = string_len(rest).ok_or_else(|| {
                    Fail::syntax(Span { start: at, end: at + 1 }, "this string does not end on its line")
                })?;
                tokens.push(Token {
                    tok: Tok::Str(&text[at + 1..at + len - 1]),
                    span: Span { start: at, end: at + len },
                });
                len
            }
            b'0'..=b'9' => {
                let (tok, len) = number(&text[at..], at)?;
                tokens.push(Token { tok, span: Span { start: at, end: at + len } });
                len
            }
            _ if is_name(b) => {
                let len = rest.iter().position(|b| !is_name(*b)).unwrap_or(rest.len());
                tokens.push(Token { tok: Tok::Word(&text[at..at + len]), span: Span { start: at, end: at + len } });
                len
            }
            _ => {
                let Some(p) = PUNCTUATION.iter().find(|p| rest.starts_with(p.as_bytes())) else {
                    let c = text[at..].chars().next().unwrap_or(' ');
                    return Err(Fail::syntax(
                        Span { start: at, end: at + c.len_utf8() },
                        format!("{c:?} has no meaning here"),
                    ));
                };
                tokens.push(Token { tok: Tok::Punct(p), span: Span { start: at, end: at + p.len() } });
                p.len()
            }
        };
        at += len;
    }
    tokens.push(Token { tok: Tok::End, span: Span { start: text.len(), end: text.len() } });
    Ok(tokens)
}

/// The length of the string at the start of `rest`, quotes included.
fn string_len(rest: &[u8]) -> Option<usize> {
    let mut n = 1;
    loop {
        match rest.get(n)? {
            b'"' => return Some(n + 1),
            b'\n' => return None,
            b'\\' if *rest.get(n + 1)? != b'\n' => n += 2,
            _ => n += 1,
        }
    }
}

fn number(text: &str, at: usize) -> Result<(Tok<'_>, usize), Fail> {
    let bytes = text.as_bytes();
    let digits = |from: usize| bytes[from.min(bytes.len())..].iter().take_while(|b| b.is_ascii_digit()).count();
    let mut len = digits(0);
    let mut float = false;
    if bytes.get(len) == Some(&b'.') && digits(len + 1) > 0 {
        len += 1 + digits(len + 1);
        float = true;
    }
    if matches!(bytes.get(len), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(len + 1), Some(b'+' | b'-')));
        if digits(len + 1 + sign) > 0 {
            len += 1 + sign + digits(len + 1 + sign);
            float = true;
        }
    }
    let span = Span { start: at, end: at + len };
    let written = &text[..len];
    if float {
        match written.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok((Tok::Float(x), len)),
            Ok(_) | Err(_) => Err(Fail::syntax(span, "this number is too large")),
        }
    } else {
        written.parse().map(|n| (Tok::Int(n), len)).map_err(|_| Fail::syntax(span, "this number is too large"))
    }
}

/// A piece of a string.
pub(super) enum Piece<'t> {
    /// Itself.
    Char(char),
    /// `{name}` or `{config.name}`: the value of a name.
    Name(&'t str),
}

/// Undoes the escapes of the inside of a string: `\"`, `\\`, `\{`, `\n`, `\t`, `\u{…}`. A brace that no name follows is
/// itself.
pub(super) fn pieces(raw: &str, span: Span) -> Result<Vec<Piece<'_>>, Fail> {
    let mut out = Vec::new();
    let mut rest = raw;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => {
                let escaped = rest.chars().next().unwrap_or('\\');
                rest = rest.get(escaped.len_utf8()..).unwrap_or("");
                out.push(Piece::Char(match escaped {
                    'n' => '\n',
                    't' => '\t',
                    'u' => {
                        let code = rest.strip_prefix('{').and_then(|r| r.split_once('}'));
                        let found = code
                            .and_then(|(hex, tail)| Some((char::from_u32(u32::from_str_radix(hex, 16).ok()?)?, tail)));
                        let Some((c, tail)) = found else {
                            return Err(Fail::syntax(
                                span,
                                "this string has a `\\u` without a character code such as `\\u{e9}`",
                            ));
                        };
                        rest = tail;
                        c
                    }
                    '"' | '\\' | '{' | '}' => escaped,
                    other => return Err(Fail::syntax(span, format!("`\\{other}` means nothing in a string"))),
                }));
            }
            '{' => {
                let len = name_len(rest.as_bytes());
                let name = rest.get(..len).unwrap_or("");
                match rest.get(len..).and_then(|tail| tail.strip_prefix('}')) {
                    Some(tail) if name.split('.').all(is_word) => {
                        out.push(Piece::Name(name));
                        rest = tail;
                    }
                    Some(_) | None => out.push(Piece::Char('{')),
                }
            }
            other => out.push(Piece::Char(other)),
        }
    }
    Ok(out)
}

/// The string as it is written, quotes included; [`pieces`] undoes it.
pub(super) fn quote(s: &str) -> String {
    let mut out = String::with_capacity(s.len() + 2);
    out.push('"');
    for c in s.chars() {
        match c {
            '"' | '\\' | '{' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toks(text: &str) -> Vec<Tok<'_>> {
        lex(text).unwrap().into_iter().map(|t| t.tok).collect()
    }

    #[test]
    fn ranges_axes_and_floats_are_told_apart() {
        assert_eq!(toks("@0..31"), [Tok::At("0"), Tok::Punct(".."), Tok::Int(31), Tok::End]);
        assert_eq!(toks("mul.1"), [Tok::Word("mul"), Tok::Punct("."), Tok::Int(1), Tok::End]);
        assert_eq!(
            toks("1e-5 2.5 3.x"),
            [Tok::Float(1e-5), Tok::Float(2.5), Tok::Int(3), Tok::Punct("."), Tok::Word("x"), Tok::End]
        );
        assert_eq!(toks("@swiglu.1(%a % 2)")[..3], [Tok::At("swiglu.1"), Tok::Punct("("), Tok::Value("a")]);
    }

    #[test]
    fn quoting_is_undone() {
        let s = "a\"b\\c{i}\n\té\u{1}";
        let quoted = quote(s);
        let tokens = lex(&quoted).unwrap();
        let Tok::Str(raw) = tokens[0].tok else { panic!("not a string") };
        let back: String = pieces(raw, tokens[0].span)
            .unwrap()
            .into_iter()
            .map(|p| match p {
                Piece::Char(c) => c,
                Piece::Name(_) => panic!("no name was written"),
            })
            .collect();
        assert_eq!(back, s);
    }

    #[test]
    fn unfinished_strings_and_strange_characters_are_errors() {
        for text in ["\"abc", "\"abc\\", "\"a\\\nb\"", "é", "1e999", "99999999999999999999", "!"] {
            assert!(lex(text).is_err(), "{text:?}");
        }
    }
}
