//! One text for one kernel: declarations in a fixed order, names counted from their first use, lines indented.
//!
//! The code generator keeps types and variables in hash tables, so that two runs print them in different orders, and
//! numbers temporaries over the whole process.

use std::collections::BTreeMap;

use super::ordering;

/// The entry's name in the generator's text.
pub(super) const ENTRY: &str = "awqc_entry";

/// A kernel's text in its one form.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Normal {
    pub(super) name: String,
    pub(super) text: String,
    /// Bytes of all shared arrays.
    pub(super) shared_bytes: usize,
}

/// Shared arrays begin at multiples of so many bytes.
const SHARED_ALIGN: usize = 16;

/// The kernel's name and text, given the words that its name begins with, the names of its arguments, and what the
/// generator printed.
pub(super) fn normal(stem: &str, args: &[String], raw: &str) -> Result<Normal, String> {
    let (head, rest) = raw.split_once("\nextern \"C\"").ok_or("the text has no entry")?;
    let (signature, body) = rest.split_once(") {\n").ok_or("the entry has no body")?;
    let uses_info = body.contains("info.") || body.contains("info_");
    let signature = format!("extern \"C\"{signature})");
    let (signature, head) = if uses_info {
        return Err("the kernel asks for lengths or numbers that are given at launch".into());
    } else {
        (signature.replace(", const __grid_constant__ info_st info", ""), without_info(head)?)
    };
    let (declarations, statements) = declarations(body);
    let (arrays, statements) = shared(&statements)?;
    let mut names = Names::default();
    let own = args.iter().enumerate().map(|(i, name)| (format!("buffer_{i}"), name.clone()));
    names.known.extend(own);
    let statements: Vec<String> = statements.iter().map(|line| names.rename(ordering::line(line))).collect();
    let mut declarations: Vec<String> = declarations.iter().map(|line| names.rename(line)).collect();
    declarations.sort_by_key(|line| (number(line), line.clone()));
    let mut text = head;
    text.push_str(&names.rename(&signature.replace("( \n", "(\n").replace(")awqc_entry", ") awqc_entry")));
    text.push_str(" {\n");
    // Shared arrays lie in the order of their first use, none on top of another.
    let mut arrays: Vec<(String, usize)> = arrays.iter().map(|a| (names.rename(a.declaration), a.bytes)).collect();
    arrays.sort_by_key(|(line, _)| (number(line), line.clone()));
    let mut shared_bytes = 0;
    for (line, bytes) in &arrays {
        let (before, _) = line.split_once("&dynamic_shared_mem[").ok_or("a shared array without a place")?;
        declarations.push(format!("{before}&dynamic_shared_mem[{shared_bytes}]); // {bytes} bytes"));
        shared_bytes = (shared_bytes + bytes).next_multiple_of(SHARED_ALIGN);
    }
    if !arrays.is_empty() {
        let at = declarations.len() - arrays.len();
        declarations.insert(at, format!("extern __shared__ __align__({SHARED_ALIGN}) uint8 dynamic_shared_mem[];"));
    }
    declarations.iter().chain(&statements).for_each(|line| {
        text.push_str(line);
        text.push('\n');
    });
    let text = indent(&literals(&text));
    let name = format!("{stem}_{:08x}", digest(&text));
    Ok(Normal { text: text.replace(ENTRY, &name), name, shared_bytes })
}

/// A shared array as the generator declares it.
struct Shared<'a> {
    declaration: &'a str,
    bytes: usize,
}

/// The shared arrays, each announced by a comment with its size, and all other lines.
fn shared<'a>(lines: &[&'a str]) -> Result<(Vec<Shared<'a>>, Vec<&'a str>), String> {
    let (mut arrays, mut rest) = (Vec::new(), Vec::new());
    let mut lines = lines.iter().copied();
    while let Some(line) = lines.next() {
        if line.starts_with("extern __shared__") {
            continue;
        }
        let Some(size) = line.trim().strip_prefix("// Shared array size: ") else {
            if line.contains("dynamic_shared_mem") {
                return Err(format!("shared memory of unknown size: {line}"));
            }
            rest.push(line);
            continue;
        };
        let bytes = size.split_whitespace().nth(1).and_then(|b| b.parse().ok());
        let (Some(bytes), Some(declaration)) = (bytes, lines.next()) else {
            return Err(format!("shared memory of unknown size: {line}"));
        };
        arrays.push(Shared { declaration, bytes });
    }
    Ok((arrays, rest))
}

/// The types, sorted, without those of launch numbers and without headers that nothing here uses.
fn without_info(head: &str) -> Result<String, String> {
    let at = head.find("struct info_st").ok_or("the text has no launch numbers")?;
    let end = at + head[at..].find("};").ok_or("a type without an end")? + 2;
    let (types, functions) = (&head[..at], &head[end..]);
    let (preamble, types) = match types.find("\nstruct ") {
        Some(at) => types.split_at(at),
        None => (types, ""),
    };
    let mut types: Vec<&str> = types.split("\nstruct ").map(str::trim).filter(|t| !t.is_empty()).collect();
    types.sort_unstable();
    let mut out = String::new();
    for line in preamble.lines().filter(|l| !l.trim().is_empty() && *l != "#include <mma.h>") {
        out.push_str(line);
        out.push('\n');
    }
    for ty in types {
        out.push_str(&format!("struct {ty}\n"));
    }
    for line in functions.lines().filter(|l| !l.trim().is_empty()) {
        out.push_str(line);
        out.push('\n');
    }
    Ok(out)
}

/// Declarations of variables that have no value yet, and all other lines.
fn declarations(body: &str) -> (Vec<&str>, Vec<&str>) {
    let declares = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words.as_slice(), [_, name] if (name.starts_with("l_mut_") || name.starts_with("l_arr_")) && name.ends_with(';'))
    };
    body.lines().filter(|l| !l.trim().is_empty()).partition(|line| declares(line))
}

/// Numbers of names, in the order in which they are met.
#[derive(Default)]
struct Names {
    known: BTreeMap<String, String>,
    count: BTreeMap<&'static str, usize>,
}

impl Names {
    /// Families of generated names and what they become.
    const FAMILIES: [(&'static str, &'static str); 5] =
        [("l_mut_", "m"), ("l_arr_", "a"), ("l_", "v"), ("_tmp_", "t"), ("shared_memory_", "s")];

    fn rename(&mut self, line: &str) -> String {
        let mut out = String::with_capacity(line.len());
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let mut rest = line;
        while let Some(start) = rest.find(word) {
            out.push_str(&rest[..start]);
            rest = &rest[start..];
            let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
            out.push_str(&self.name(&rest[..end]));
            rest = &rest[end..];
        }
        out.push_str(rest);
        out
    }

    fn name(&mut self, old: &str) -> String {
        if let Some(new) = self.known.get(old) {
            return new.clone();
        }
        // A function that computes a variable is called after it.
        let (function, stem) = match old.strip_prefix("plane_") {
            Some(stem) if stem.starts_with("l_") => ("plane_", stem),
            Some(_) | None => ("", old),
        };
        if !function.is_empty() {
            return format!("{function}{}", self.name(stem));
        }
        let family = Self::FAMILIES
            .iter()
            .find(|(prefix, _)| old.strip_prefix(prefix).is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit())));
        let Some((_, letter)) = family else { return old.to_owned() };
        let count = self.count.entry(letter).or_default();
        let new = format!("{letter}{count}");
        *count += 1;
        self.known.insert(old.to_owned(), new.clone());
        new
    }
}

/// The number in the name that a line declares.
fn number(line: &str) -> usize {
    let name = line.split_whitespace().nth(1).unwrap_or("");
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.split(|c: char| !c.is_ascii_digit()).next().and_then(|d| d.parse().ok()).unwrap_or(usize::MAX)
}

/// `uint32(7)` as `7u`, `int32(7)` as `7`.
fn literals(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("uint32(") {
        let (before, after) = (&rest[..at], &rest[at + 7..]);
        out.push_str(before);
        let digits = after.len() - after.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if digits > 0 && after[digits..].starts_with(')') {
            out.push_str(&after[..digits]);
            out.push('u');
            rest = &after[digits + 1..];
        } else {
            out.push_str("uint32(");
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Lines by the depth of their braces.
fn indent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut depth = 0usize;
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let closing = line.chars().take_while(|c| *c == '}').count();
        let level = depth.saturating_sub(closing);
        out.push_str(&"    ".repeat(level));
        out.push_str(line);
        out.push('\n');
        let (open, close) = (line.matches('{').count(), line.matches('}').count());
        depth = (depth + open).saturating_sub(close);
    }
    out
}

/// FNV-1a, folded to 32 bits: tells texts apart, nothing more.
fn digest(text: &str) -> u32 {
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    (hash ^ (hash >> 32)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_declarations_and_the_count_of_names_do_not_matter() {
        let array = |name: &str, ty: &str, at: usize| {
            format!(
                "// Shared array size: 2, 8 bytes\n{ty} *shared_memory_{name} = reinterpret_cast<{ty}*>(&dynamic_shared_mem[{at}]);"
            )
        };
        let text = |a: &str, b: &str, (i, j): (&str, &str), arrays: [String; 2]| {
            format!(
                "#include <mma.h>\n#include <x.h>\n\nstruct {a};\nstruct {b};\nstruct info_st {{\n uint32 m[2];\n}};\n\nextern \"C\" \
                 __global__ void __launch_bounds__(32)awqc_entry (\n  uint* buffer_0, const __grid_constant__ info_st \
                 info\n) {{\nfloat l_mut_{i};\nint l_arr_{j}[2];\nextern __shared__ __align__(4) uint8 \
                 dynamic_shared_mem[];\n{}\nl_mut_{i} = l_arr_{j}[uint32(1)] + _tmp_{i};\nshared_memory_{i}[0] = \
                 shared_memory_{j}[1];\n}}",
                arrays.join("\n")
            )
        };
        let args = ["out".to_owned()];
        let one = text("A {\n}", "B {\n}", ("3", "9"), [array("3", "float", 8), array("9", "uint32", 0)]);
        let other = text("B {\n}", "A {\n}", ("4", "2"), [array("2", "uint32", 8), array("4", "float", 0)]);
        let (one, other) = (normal("k", &args, &one).unwrap(), normal("k", &args, &other).unwrap());
        assert_eq!(one, other);
        let text = &one.text;
        assert!(text.contains("uint* out") && text.contains(&format!(") {} (", one.name)), "{text}");
        assert!(text.contains("m0 = a0[1u] + t0;") && !text.contains("info") && !text.contains("mma.h"), "{text}");
        assert!(text.contains("float *s0 = reinterpret_cast<float*>(&dynamic_shared_mem[0]); // 8 bytes"), "{text}");
        assert!(text.contains("uint32 *s1 = reinterpret_cast<uint32*>(&dynamic_shared_mem[16]); // 8 bytes"), "{text}");
        assert_eq!(one.shared_bytes, 32);
    }
}
