//! A module: the whole model as a chain of regions, and the fused ops that its regions use.

use serde_json::{Map, Value as Json};

use crate::region::{Region, RegionName};
use crate::ty::{Elem, Name};

/// A model.
///
/// Regions run in order over the *stream*, a list of values that starts as the module's inputs: token ids
/// `i32[B,S]` and positions `i32[S]`; before them come pixels `[N,C,H,W]` if that is what the first region takes (see
/// [`crate::images`]). A region's parameters are bound to a prefix of the stream; its results replace a
/// prefix of it. The last region's first result is the logits `[B,S,vocab]`.
#[derive(Clone, Debug)]
pub struct Module {
    /// The model's name.
    pub name: Name,
    /// The element type that sources of unknown type have, `f16` unless the text says otherwise.
    pub dtype: Elem,
    /// Facts about the model for people and for artefact configs (`hidden`, `layers`, …); no pass reads them.
    pub header: Map<String, Json>,
    /// Symbolic dimensions, in order of declaration.
    pub dims: Vec<Name>,
    /// Fused ops, each defined once.
    pub fused: Vec<FusedDef>,
    /// The chain.
    pub regions: Vec<Region>,
}

/// The meaning of a fused op: a region whose parameters are the call's operands, weights included.
///
/// A definition is monomorphic. A second instance of other shapes gets a suffix (`@swiglu.1`); a back end chooses its
/// kernel by [`FusedDef::kernel`] and the body's types and attributes.
#[derive(Clone, Debug)]
pub struct FusedDef {
    /// What calls name.
    pub name: Name,
    /// What a call means.
    pub body: Region,
}

impl FusedDef {
    /// The name without the instance suffix.
    pub fn kernel(&self) -> &str {
        self.name.split_once('.').map_or(&self.name, |(kernel, _)| kernel)
    }
}

impl Module {
    /// An empty module of element type `dtype` with the dimensions `B` and `S`.
    pub fn new(name: impl Into<Name>, dtype: Elem) -> Self {
        Self {
            name: name.into(),
            dtype,
            header: Map::new(),
            dims: vec!["B".into(), "S".into()],
            fused: Vec::new(),
            regions: Vec::new(),
        }
    }

    /// The definition of a fused op.
    pub fn fused_def(&self, name: &str) -> Option<&FusedDef> {
        self.fused.iter().find(|d| &*d.name == name)
    }

    /// The region of this name.
    pub fn region(&self, name: &RegionName) -> Option<&Region> {
        self.regions.iter().find(|r| r.name == *name)
    }

    /// Number of repeated blocks.
    pub fn layers(&self) -> usize {
        self.regions.iter().filter(|r| r.name.is_layer()).count()
    }
}
