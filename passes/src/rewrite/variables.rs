//! Variables of rules: words in capitals that stand for the attributes of what was matched.

use std::collections::BTreeSet;

use awqc_ir::Region;
use awqc_ir::text::Env;
use serde_json::Value as Json;

use super::matcher::Match;

/// The variable that an attribute of a pattern is, if it is one: `{eps=E}`.
pub(super) fn variable(value: &Json) -> Option<&str> {
    value.as_str().filter(|word| is_variable(word))
}

fn is_variable(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// The variables that occur in a text, outside quotes.
pub(super) fn variables(text: &str) -> BTreeSet<String> {
    let code = text.split('"').step_by(2);
    let words = code.flat_map(|t| t.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')));
    words.filter(|w| is_variable(w)).map(str::to_owned).collect()
}

/// Names of a rule before it was matched: every variable is 1, to see whether expressions have their form.
pub(super) struct Unmatched;

impl Env for Unmatched {
    fn lookup(&self, path: &str) -> Option<Json> {
        is_variable(path).then(|| 1.into())
    }

    fn tensor(&self, _: &str) -> bool {
        true
    }
}

/// Names of a rule where it was matched: its variables, and `x.channels` for the channels of `%x`.
pub(super) struct Matched<'a> {
    pub(super) found: &'a Match,
    pub(super) region: &'a Region,
}

impl Env for Matched<'_> {
    fn lookup(&self, path: &str) -> Option<Json> {
        if let Some(value) = path.strip_suffix(".channels") {
            let value = self.region.value(*self.found.values.get(value)?);
            return value.ty.channels().map(Json::from);
        }
        self.found.attributes.get(path).cloned()
    }

    fn tensor(&self, _: &str) -> bool {
        true
    }
}
