//! Models that also take images: what their modules look like, and what a program must know to feed them.
//!
//! The first region of such a module takes pixels, `[N,C,H,W]`, and the stream begins with them; token ids and
//! positions come after them. The regions that take one value are its *eye*: they see pixels and nothing else, so they
//! run once for each image. The first region that takes more joins what they made of the images with the text.

use serde::{Deserialize, Serialize};

use crate::module::Module;
use crate::op::Op;
use crate::region::Region;
use crate::ty::{Dim, Type};

/// The images that a module takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// Numbers of a pixel: 3 for red, green and blue.
    pub channels: u64,
    /// Lines.
    pub height: u64,
    /// Pixels of a line.
    pub width: u64,
    /// The token that stands for an image in a text, if the module looks for one.
    pub token: Option<u32>,
    /// How many of these tokens an image takes.
    pub tokens: u64,
}

/// Rows of images that stand in a text ([`crate::op::Place`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placed {
    /// The token that stands for one.
    pub token: u32,
    /// Channels.
    pub width: usize,
}

/// The channels, lines and columns of pixels, `[N,C,H,W]` with a symbol for the number of images; `None` for any other
/// type.
pub fn pixels(ty: &Type) -> Option<[u64; 3]> {
    match ty.shape.as_slice() {
        [Dim::Sym(_), Dim::Const(c), Dim::Const(h), Dim::Const(w)] if ty.elem.is_float() => Some([*c, *h, *w]),
        _ => None,
    }
}

/// What a region takes if it begins with pixels.
pub fn takes_pixels(region: &Region) -> Option<[u64; 3]> {
    pixels(&region.value(region.value_params().next()?).ty)
}

impl Module {
    /// How many regions make up the module's eye; 0 for a model that takes text alone.
    pub fn eye(&self) -> usize {
        match self.regions.first().and_then(takes_pixels) {
            Some(_) => self.regions.iter().take_while(|r| r.value_params().count() == 1).count(),
            None => 0,
        }
    }

    /// The regions of the eye, and those behind it.
    pub fn eye_and_text(&self) -> (&[Region], &[Region]) {
        self.regions.split_at(self.eye())
    }

    /// The images that the module takes, if it takes any.
    pub fn images(&self) -> Option<Images> {
        let [channels, height, width] = takes_pixels(self.regions.first()?)?;
        let (mut token, mut tokens) = (None, 0);
        for (region, node) in self.regions.iter().flat_map(|r| r.nodes().map(move |(_, n)| (r, n))) {
            if let Op::Place(place) = &node.op {
                let rows = node.operands.get(2).map(|o| region.operand_type(*o));
                let rows = rows.and_then(|ty| ty.shape.get(1)?.as_const());
                (token, tokens) = (Some(place.token), rows.unwrap_or(0));
            }
            if let Op::Count(count) = &node.op {
                (token, tokens) = (Some(count.token), 1);
            }
        }
        Some(Images { channels, height, width, token, tokens })
    }
}
