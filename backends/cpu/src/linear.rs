//! Products with packed weights: what the activations are rounded to, and which kernel takes them.

use std::ops::Range;

use awqc_ir::panels::Panels;

use crate::kernels::{self, Acts, Bf16Acts, FloatActs, Isa, Line, OutTile};

/// What packed linears multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Activations rounded to 8 bits, with a scale for every 32 channels.
    #[default]
    Int8,
    /// Activations, and weights, rounded to bf16 where many tokens come together, and the same as [`Int8`](Self::Int8)
    /// where few do. For [`Isa::Amx`] alone.
    Bf16,
    /// Activations as they are.
    F32,
}

impl Activations {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Int8, Self::Bf16, Self::F32];

    /// What the command line calls them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// The fastest for an instruction set.
    pub fn fastest(isa: Isa) -> Self {
        if isa == Isa::Amx { Self::Bf16 } else { Self::Int8 }
    }

    /// Whether an instruction set has kernels for them.
    pub fn works_with(self, isa: Isa) -> bool {
        self != Self::Bf16 || isa == Isa::Amx
    }

    /// What so many tokens that come together are multiplied as.
    pub fn of(self, tokens: usize) -> Self {
        if self == Self::Bf16 && tokens < MANY { Self::Int8 } else { self }
    }
}

/// Fewer tokens than this are faster with 8 bits: the weights' numbers are not worth making.
const MANY: usize = 16;

/// One tile of activations in the form that packed linears take.
#[derive(Debug, Default)]
pub struct Operand {
    /// The form that was filled last.
    form: Activations,
    int8: Acts,
    bf16: Bf16Acts,
    float: FloatActs,
}

impl Operand {
    /// Takes `x`, `[tokens, cols]`, for weights of this shape.
    ///
    /// # Panics
    /// When `x` is not that long, or the machine lacks `isa`.
    pub fn fill(&mut self, isa: Isa, form: Activations, shape: &Panels, tokens: usize, x: &[f32]) {
        self.form = form;
        match form {
            Activations::Int8 => self.int8.quantize(isa, shape, tokens, x),
            Activations::Bf16 => self.bf16.round(shape, tokens, x),
            Activations::F32 => self.float.copy(shape, tokens, x),
        }
    }
}

/// The product of all tokens of some operands, which have one form, with some panels of a weight. `room` is scratch
/// memory.
///
/// # Panics
/// When the machine lacks `isa`, a size is not what the shape says, or the operands' forms differ.
pub fn multiply(
    isa: Isa,
    operands: &[&Operand],
    shape: &Panels,
    bytes: &[u8],
    panels: Range<usize>,
    room: &mut Vec<Line>,
    mut out: OutTile<'_>,
) {
    let Some(form) = operands.first().map(|x| x.form) else { return };
    assert!(operands.iter().all(|x| x.form == form), "operands of several forms");
    if form == Activations::Bf16 {
        let acts: Vec<&Bf16Acts> = operands.iter().map(|x| &x.bf16).collect();
        return kernels::matmul_bf16(shape, bytes, panels, &acts, room, out);
    }
    for x in operands {
        let (exact, own) = (form == Activations::F32, panels.clone());
        let (here, rest) = out.split_tokens(if exact { x.float.tokens() } else { x.int8.tokens() });
        if exact {
            kernels::matmul_f32(isa, shape, bytes, own, &x.float, here);
        } else {
            kernels::matmul_i8(isa, shape, bytes, own, &x.int8, here);
        }
        out = rest;
    }
}
