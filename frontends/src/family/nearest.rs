//! Which family a checkpoint is nearest to that fits none: by the kinds of tensors that it has, numbers in their names
//! aside, and by the keys of its configuration. For messages only: nothing is imported on a guess.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value as Json};

use super::Family;
use crate::quantized::PARTS;

/// A family and how well a checkpoint fits it.
pub(crate) struct Nearest {
    pub(crate) family: String,
    class: String,
    /// From 0 to 1: kinds of tensors in common, of all of both.
    pub(crate) score: f64,
    fits: usize,
    kinds: usize,
    prefix: Prefix,
    keys: usize,
    of_keys: usize,
    missing: Vec<String>,
    surplus: Vec<String>,
    /// Others with the same score.
    same: Vec<String>,
}

/// What has to be done to the checkpoint's names before they fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Prefix {
    #[default]
    Same,
    Add(String),
    Strip(String),
}

impl Prefix {
    fn apply(&self, name: &str) -> String {
        match self {
            Prefix::Same => name.to_owned(),
            Prefix::Add(p) => format!("{p}{name}"),
            Prefix::Strip(p) => name.strip_prefix(p.as_str()).unwrap_or(name).to_owned(),
        }
    }
}

/// The family that the tensors of these names fit best, if any fits at all.
pub(crate) fn nearest<'f>(
    families: impl IntoIterator<Item = &'f Family>,
    config: &Map<String, Json>,
    names: &[String],
) -> Option<Nearest> {
    let mut all: Vec<Nearest> =
        families.into_iter().map(|f| fit(f, config, names)).filter(|n| n.score >= ENOUGH).collect();
    // Of families with the same tensors, the one that the configuration names, or whose keys it has.
    let model_type = config.get("model_type").and_then(Json::as_str);
    let rest = |n: &Nearest| (Some(n.family.as_str()) != model_type, Reverse(n.keys), n.of_keys);
    all.sort_by(|a, b| b.score.total_cmp(&a.score).then(rest(a).cmp(&rest(b))));
    let mut all = all.into_iter();
    let mut best = all.next()?;
    best.same = all.take_while(|n| n.score == best.score).map(|n| n.family).collect();
    best.same.dedup();
    Some(best)
}

/// The least score of a family that is worth a mention.
const ENOUGH: f64 = 0.25;

fn fit(family: &Family, config: &Map<String, Json>, names: &[String]) -> Nearest {
    let (required, optional) = kinds(&family.template);
    let known = |n: &String| required.contains(n) || optional.contains(n);
    let seen = |prefix: &Prefix| -> BTreeSet<String> {
        let named = names.iter().map(|n| family.name_of(&prefix.apply(&logical(n))));
        // What is ignored under a condition may be of use without it.
        let ignored = |n: &String| family.ignore.iter().any(|(p, _)| p.matches(n).is_some());
        named.filter(|n| known(&starred(n)) || !ignored(n)).map(|n| starred(&n)).collect()
    };
    let here = seen(&Prefix::Same);
    let other = prefix(&here, &required);
    let prefix = if seen(&other).iter().filter(|n| known(n)).count() > here.iter().filter(|n| known(n)).count() {
        other
    } else {
        Prefix::Same
    };
    let here = seen(&prefix);
    let fits = here.iter().filter(|n| known(n)).count();
    let missing: Vec<String> = required.iter().filter(|n| !here.contains(*n)).cloned().collect();
    let surplus: Vec<String> = here.iter().filter(|n| !known(n)).cloned().collect();
    Nearest {
        family: family.name.clone(),
        class: family.classes.first().cloned().unwrap_or_default(),
        score: fits as f64 / (fits + missing.len() + surplus.len()).max(1) as f64,
        fits,
        kinds: here.len(),
        prefix,
        keys: family.keys.iter().filter(|k| config.contains_key(&k.key)).count(),
        of_keys: family.keys.len(),
        missing,
        surplus,
        same: Vec::new(),
    }
}

/// The weight that a tensor is, or is a part of.
fn logical(name: &str) -> String {
    if let Some(stem) = PARTS.iter().find_map(|p| name.strip_suffix(p)) {
        return format!("{stem}.weight");
    }
    name.to_owned()
}

/// A name with `*` for each number.
fn starred(name: &str) -> String {
    let part =
        |p: &str| if p.bytes().all(|b| b.is_ascii_digit()) && !p.is_empty() { "*".to_owned() } else { p.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// What most names miss, or have too much, at their beginning.
fn prefix(here: &BTreeSet<String>, there: &BTreeSet<String>) -> Prefix {
    let mut counts: BTreeMap<Prefix, usize> = BTreeMap::new();
    for (mine, theirs) in here.iter().flat_map(|m| there.iter().map(move |t| (m, t))) {
        let whole = |p: &&str| p.ends_with('.') && !p.contains('*');
        let found = match (
            theirs.strip_suffix(mine.as_str()).filter(whole),
            mine.strip_suffix(theirs.as_str()).filter(whole),
        ) {
            (Some(p), _) => Prefix::Add(p.to_owned()),
            (None, Some(p)) => Prefix::Strip(p.to_owned()),
            (None, None) => continue,
        };
        *counts.entry(found).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map(|(p, _)| p).unwrap_or_default()
}

/// The names of tensors in a template, with `*` for numbers: those that every model has, and those that some have. What
/// conditions leave out is not known here, so the first may be too many.
fn kinds(template: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut required, mut optional) = (BTreeSet::new(), BTreeSet::new());
    let mut prefix = String::new();
    for line in template.lines() {
        let line = line.split("//").next().unwrap_or("").trim();
        if line.starts_with("layer ") || line.starts_with("region ") {
            prefix = line
                .split(" from \"")
                .nth(1)
                .and_then(|p| p.split('"').next())
                .map(|p| format!("{p}."))
                .unwrap_or_default();
        }
        let Some((_, of)) = line.split_once('=').filter(|_| line.starts_with('$')) else { continue };
        let parts: Vec<&str> = of.split('"').collect();
        // Every other part was in quotes.
        for pair in parts.get(1..).unwrap_or(&[]).chunks(2) {
            let [name, after] = pair else { continue };
            let kind = starred(&holes(&format!("{prefix}{name}")));
            if after.starts_with('?') || of.trim_start().starts_with("if ") {
                optional.insert(kind);
            } else {
                required.insert(kind);
            }
        }
    }
    (required, optional)
}

/// A name with `*` for each `{…}`.
fn holes(name: &str) -> String {
    let mut parts = name.split('{');
    let head = parts.next().unwrap_or("").to_owned();
    parts.fold(head, |out, part| format!("{out}*{}", part.split_once('}').map_or("", |(_, rest)| rest)))
}

/// At most four of a list.
fn some(list: &[String]) -> String {
    let first: Vec<String> = list.iter().take(4).map(|n| format!("`{n}`")).collect();
    match list.len().saturating_sub(4) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

impl Nearest {
    /// What fits and what does not, in one sentence.
    pub(crate) fn words(&self) -> String {
        let mut out =
            format!("the nearest family is `{}`: {} of {} kinds of tensors fit it", self.family, self.fits, self.kinds);
        match &self.prefix {
            Prefix::Same => {}
            Prefix::Add(p) => out += &format!(" with `{p}` before their names"),
            Prefix::Strip(p) => out += &format!(" without `{p}` before their names"),
        }
        if !self.same.is_empty() {
            out += &format!(" (as they do {})", some(&self.same));
        }
        out += &format!(", {} of its {} configuration keys are there", self.keys, self.of_keys);
        for (what, list) in [("missing", &self.missing), ("surplus", &self.surplus)] {
            if !list.is_empty() {
                out += &format!("; {what}: {}", some(list));
            }
        }
        out
    }

    /// What to do with a model of an unknown class.
    pub(crate) fn remedy(&self) -> String {
        format!(
            "If the model computes what `{}` does, set `architectures` to [\"{}\"]; otherwise describe it in a file under arch/",
            self.family, self.class
        )
    }

    /// Whether the names would fit if another prefix were read.
    pub(crate) fn renames(&self) -> bool {
        self.prefix != Prefix::Same
    }
}
