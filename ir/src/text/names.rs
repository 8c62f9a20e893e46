//! Names as they are printed: legal in the text and different from each other.

use std::collections::BTreeSet;

use crate::ty::Name;

use super::lex::is_sigil_name;

/// For each hint, a name: the hint itself where it is legal and new, otherwise the nearest such name.
pub(super) fn unique<'a>(hints: impl IntoIterator<Item = Option<&'a Name>>, base: &str) -> Vec<String> {
    let wished: Vec<String> =
        hints.into_iter().map(|h| h.map_or_else(|| base.to_owned(), |h| legal(h, base))).collect();
    // A duplicate must not take a name that a later entry has by right.
    let by_right: BTreeSet<&str> = wished.iter().map(String::as_str).collect();
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut next = std::collections::BTreeMap::<&str, u64>::new();
    let mut out = Vec::with_capacity(wished.len());
    for name in &wished {
        let mut chosen = name.clone();
        if taken.contains(&chosen) {
            let n = next.entry(name).or_insert(1);
            while taken.contains(&chosen) || by_right.contains(chosen.as_str()) {
                chosen = format!("{name}.{n}");
                *n += 1;
            }
        }
        taken.insert(chosen.clone());
        out.push(chosen);
    }
    out
}

/// The hint with whatever cannot stand in a name replaced.
pub(super) fn legal(hint: &str, base: &str) -> String {
    if is_sigil_name(hint) {
        return hint.to_owned();
    }
    let replaced: String = hint.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
    if replaced.is_empty() { base.to_owned() } else { replaced }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_legal_and_different() {
        let hints: Vec<Name> = ["x", "x", "x.1", "a b", "", "x", "a..b", "é"].into_iter().map(Name::from).collect();
        let names = unique(hints.iter().map(Some).chain([None, None]), "v");
        assert_eq!(names, ["x", "x.2", "x.1", "a_b", "v", "x.3", "a__b", "_", "v.1", "v.2"]);
        let again: Vec<Name> = names.iter().map(|n| n.as_str().into()).collect();
        assert_eq!(unique(again.iter().map(Some), "v"), names);
    }
}
