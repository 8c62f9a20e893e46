//! The `gguf` section of a family file: how the metadata and tensors of a GGUF file map to the family's own.

use super::pattern::Pattern;

/// `gguf "ARCHITECTURE" for CLASS { … }`.
#[derive(Clone, Debug)]
pub struct GgufSection {
    /// The value of `general.architecture`.
    pub architecture: String,
    /// The class that the configuration names.
    pub class: String,
    /// `config KEY = EXPR`: key and expression, in order.
    pub config: Vec<(String, String)>,
    /// `tensor "theirs" = "ours" …`.
    pub tensors: Vec<TensorRule>,
    /// `rope_factors "name"`: a tensor of divisors for the rotary frequencies.
    pub rope_factors: Option<String>,
}

/// One `tensor` line.
#[derive(Clone, Debug)]
pub struct TensorRule {
    /// The name in the file.
    pub theirs: Pattern,
    /// The name in the family's template.
    pub ours: Pattern,
    /// What the converter did to the numbers, and is undone.
    pub undo: Vec<Undo>,
}

/// Something to undo.
#[derive(Clone, Debug, PartialEq)]
pub enum Undo {
    /// `unpermute KEY`: the rows of each of `config.KEY` heads were reordered for rotation of neighbouring pairs.
    Unpermute(String),
    /// `plus C`: a constant was taken away.
    Plus(f32),
    /// `transpose`: the two axes were exchanged.
    Transpose,
}

impl TensorRule {
    /// Our name for their tensor `name`, if this rule is about it.
    pub fn apply(&self, name: &str) -> Option<String> {
        self.theirs.matches(name).map(|number| self.ours.with(number))
    }
}
