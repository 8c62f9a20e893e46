//! The directives at the head of a family file. The lines after them are the template, in the IR's own text.
//!
//! ```text
//! arch "NAME" for CLASS, CLASS [when EXPR]     which models the file describes
//! key KIND[?] KEY, KEY                         configuration keys and what they must hold; `?`: may be missing or null
//! harmless KEY, KEY                            keys that change nothing of what the model computes
//! fixed KEY = JSON                             a key that is known with this value only
//! part "FOLDER" = KEY                          a part of the model in a folder of its own, and where its configuration goes
//! alias "PREFIX" = "PREFIX"                    tensor names that begin with the first are read as if with the second
//! ignore "PATTERN" [when EXPR]                 tensors that are known to be of no use; `number` is what `{i}` stands for
//! only "PATTERN" when EXPR                     tensors that are there if, and only if, the condition holds
//! gguf "NAME" for CLASS { … }                  the same model in a GGUF file, see the `gguf` module
//! ```

use super::gguf::{GgufSection, TensorRule, Undo};
use super::pattern::Pattern;
use super::{Condition, Family, KeyKind, KeyRule, Part};

/// Parses a family file.
///
/// # Errors
/// The line and what is wrong with it.
pub(super) fn parse(file: &'static str, text: &str) -> Result<Family, String> {
    let mut family = Family {
        name: String::new(),
        file,
        classes: Vec::new(),
        when: None,
        keys: Vec::new(),
        harmless: Vec::new(),
        fixed: Vec::new(),
        parts: Vec::new(),
        aliases: Vec::new(),
        ignore: Vec::new(),
        only: Vec::new(),
        gguf: Vec::new(),
        template: String::with_capacity(text.len()),
    };
    let mut open: Option<GgufSection> = None;
    let mut directives = true;
    for (number, line) in text.lines().enumerate() {
        let fail = |message: String| format!("arch/{file}:{}: {message}", number + 1);
        let mut words = Words(strip_comment(line));
        directives = directives && !matches!(words.peek(), Some("awqir"));
        if !directives {
            family.template.push_str(line);
        } else if let Some(mut section) = open.take() {
            if words.peek() == Some("}") {
                family.gguf.push(section);
            } else {
                gguf_line(&mut section, &mut words).map_err(fail)?;
                open = Some(section);
            }
        } else {
            open = directive(&mut family, &mut words).map_err(fail)?;
        }
        // Lines keep their numbers for the parser of the template.
        family.template.push('\n');
    }
    if open.is_some() {
        return Err(format!("arch/{file}: the gguf section has no end"));
    }
    if family.name.is_empty() || family.classes.is_empty() {
        return Err(format!("arch/{file}: there is no `arch` line"));
    }
    Ok(family)
}

/// A `//` inside a string is no comment.
fn strip_comment(line: &str) -> &str {
    let mut inside = false;
    let bytes = line.as_bytes();
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'"' => inside = !inside,
            b'/' if !inside && bytes.get(at + 1) == Some(&b'/') => return &line[..at],
            _ => {}
        }
    }
    line
}

/// The words of a line: quoted strings are one, so are `,`, `=` and braces.
struct Words<'l>(&'l str);

impl<'l> Words<'l> {
    fn split(&self) -> Option<(&'l str, &'l str)> {
        let line = self.0.trim_start();
        let mut chars = line.char_indices();
        let len = match chars.next()? {
            (_, '"') => chars.find(|(_, c)| *c == '"').map_or(line.len(), |(at, _)| at + 1),
            (_, ',' | '=' | '{' | '}') => 1,
            _ => chars
                .find(|(_, c)| c.is_whitespace() || matches!(c, ',' | '=' | '{' | '}' | '"'))
                .map_or(line.len(), |(at, _)| at),
        };
        Some(line.split_at(len))
    }

    fn peek(&self) -> Option<&'l str> {
        self.split().map(|(word, _)| word)
    }

    fn next(&mut self, what: &str) -> Result<&'l str, String> {
        let (word, rest) = self.split().ok_or_else(|| format!("{what} is expected"))?;
        self.0 = rest;
        Ok(word)
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let word = self.next(what)?;
        let inner = word.strip_prefix('"').and_then(|w| w.strip_suffix('"'));
        inner.map(str::to_owned).ok_or_else(|| format!("{what} in quotes is expected, not {word}"))
    }

    fn expect(&mut self, word: &str) -> Result<(), String> {
        match self.next(word)? {
            found if found == word => Ok(()),
            found => Err(format!("`{word}` is expected, not {found}")),
        }
    }

    /// `A, B, C`.
    fn list(&mut self, what: &str) -> Result<Vec<String>, String> {
        let mut out = vec![self.next(what)?.to_owned()];
        while self.peek() == Some(",") {
            self.expect(",")?;
            out.push(self.next(what)?.to_owned());
        }
        Ok(out)
    }

    /// The rest of the line.
    fn rest(&mut self, what: &str) -> Result<String, String> {
        match std::mem::take(&mut self.0).trim() {
            "" => Err(format!("{what} is expected")),
            rest => Ok(rest.to_owned()),
        }
    }

    fn condition(&mut self) -> Result<Option<Condition>, String> {
        if self.peek() != Some("when") {
            return Ok(None);
        }
        self.expect("when")?;
        Ok(Some(Condition(self.rest("a condition")?)))
    }

    fn end(&self) -> Result<(), String> {
        self.peek().map_or(Ok(()), |word| Err(format!("the end of the line is expected, not {word}")))
    }
}

fn directive(family: &mut Family, words: &mut Words<'_>) -> Result<Option<GgufSection>, String> {
    let Some(word) = words.peek() else { return Ok(None) };
    words.expect(word)?;
    match word {
        "arch" => {
            family.name = words.string("the family's name")?;
            words.expect("for")?;
            family.classes = words.list("a class")?;
            family.when = words.condition()?;
        }
        "key" => {
            let word = words.next("a kind")?;
            let (kind, optional) = word.strip_suffix('?').map_or((word, false), |w| (w, true));
            let kind = match kind {
                "size" => KeyKind::Size,
                "count" => KeyKind::Count,
                "number" => KeyKind::Number,
                "flag" => KeyKind::Flag,
                "text" => KeyKind::Text,
                "list" => KeyKind::List,
                "object" => KeyKind::Object,
                other => {
                    return Err(format!(
                        "`{other}` is not a kind: size, count, number, flag, text, list and object are"
                    ));
                }
            };
            let keys = words.list("a key")?;
            family.keys.extend(keys.into_iter().map(|key| KeyRule { key, kind, optional }));
        }
        "harmless" => family.harmless.extend(words.list("a key")?),
        "fixed" => {
            let key = words.next("a key")?.to_owned();
            words.expect("=")?;
            family.fixed.push((key, words.rest("a value")?));
        }
        "part" => {
            let folder = words.string("a folder")?;
            words.expect("=")?;
            family.parts.push(Part { folder, key: words.next("a key")?.to_owned() });
        }
        "alias" => {
            let theirs = words.string("a prefix")?;
            words.expect("=")?;
            family.aliases.push((theirs, words.string("a prefix")?));
        }
        "ignore" => family.ignore.push((Pattern(words.string("a tensor's name")?), words.condition()?)),
        "only" => {
            let pattern = Pattern(words.string("a tensor's name")?);
            let condition = words.condition()?.ok_or("`when` is expected")?;
            family.only.push((pattern, condition));
        }
        "gguf" => {
            let architecture = words.string("an architecture")?;
            words.expect("for")?;
            let class = words.next("a class")?.to_owned();
            words.expect("{")?;
            words.end()?;
            return Ok(Some(GgufSection {
                architecture,
                class,
                config: Vec::new(),
                tensors: Vec::new(),
                rope_factors: None,
            }));
        }
        other => return Err(format!("`{other}` is not a directive; the template begins with `awqir`")),
    }
    words.end()?;
    Ok(None)
}

fn gguf_line(section: &mut GgufSection, words: &mut Words<'_>) -> Result<(), String> {
    let Some(word) = words.peek() else { return Ok(()) };
    words.expect(word)?;
    match word {
        "config" => {
            let key = words.next("a key")?.to_owned();
            words.expect("=")?;
            section.config.push((key, words.rest("an expression")?));
        }
        "rope_factors" => section.rope_factors = Some(words.string("a tensor's name")?),
        "tensor" => {
            let theirs = Pattern(words.string("a tensor's name")?);
            words.expect("=")?;
            let ours = Pattern(words.string("a tensor's name")?);
            let mut undo = Vec::new();
            while let Some(word) = words.peek() {
                words.expect(word)?;
                undo.push(match word {
                    "unpermute" => Undo::Unpermute(words.next("a key")?.to_owned()),
                    "plus" => Undo::Plus(words.next("a number")?.parse().map_err(|_| "a number is expected")?),
                    "transpose" => Undo::Transpose,
                    other => return Err(format!("`{other}` is not known: unpermute, plus and transpose are")),
                });
            }
            section.tensors.push(TensorRule { theirs, ours, undo });
        }
        other => return Err(format!("`{other}` is not known in a gguf section: config, tensor and rope_factors are")),
    }
    words.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "// A family.\narch \"toy\" for ToyForCausalLM, ToyModel when config.kind == 3\nkey size? a, b // both\npart \"eye\" = eye_cfg\nalias \"h.\" = \"t.h.\"\n\
        ignore \"h.{i}.mask\"\nonly \"b//c\" when config.bias ?? false\ngguf \"toy\" for ToyForCausalLM {\n  config a = gguf.toy.a ?? 1\n\
        tensor \"x.{i}\" = \"y.{i}\" unpermute heads plus -1\n}\nawqir 1\nmodel \"toy\"\n";

    #[test]
    fn every_directive_is_read() {
        let f = parse("toy.awqir", HEAD).unwrap();
        assert_eq!((f.name.as_str(), f.classes.len()), ("toy", 2));
        assert_eq!(f.when.unwrap().0, "config.kind == 3");
        assert_eq!(f.keys.iter().map(|k| (k.key.as_str(), k.optional)).collect::<Vec<_>>(), [("a", true), ("b", true)]);
        assert_eq!(f.aliases, [("h.".to_owned(), "t.h.".to_owned())]);
        assert_eq!(f.parts, [Part { folder: "eye".into(), key: "eye_cfg".into() }]);
        assert_eq!(f.only[0].0.0, "b//c");
        let g = &f.gguf[0];
        assert_eq!(g.config, [("a".to_owned(), "gguf.toy.a ?? 1".to_owned())]);
        assert_eq!(g.tensors[0].apply("x.4").unwrap(), "y.4");
        assert_eq!(g.tensors[0].undo, [Undo::Unpermute("heads".into()), Undo::Plus(-1.0)]);
    }

    #[test]
    fn the_template_keeps_its_line_numbers() {
        let f = parse("toy.awqir", HEAD).unwrap();
        let at = HEAD.lines().position(|l| l == "awqir 1").unwrap();
        assert_eq!(f.template.lines().nth(at), Some("awqir 1"));
        assert!(f.template.lines().take(at).all(str::is_empty));
    }

    #[test]
    fn errors_name_the_line() {
        let e = parse("toy.awqir", "arch \"toy\" for A\nkey sizes b\n").unwrap_err();
        assert!(e.starts_with("arch/toy.awqir:2:") && e.contains("sizes"), "{e}");
    }
}
