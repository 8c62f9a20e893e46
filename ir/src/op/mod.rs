//! The ops: a closed set, one struct an op, and one line an op in the table at the end of this file.
//!
//! An op knows four things about itself: its mnemonic, what operands it takes, the types of its results, and its
//! *scale law*, the equations that it imposes on per-channel scales (see [`law`]). Evaluation lives in `awqc-exec`.

pub mod elementwise;
pub mod embedding;
pub mod foreign;
pub mod fused;
pub mod image;
pub mod law;
pub mod linear;
pub mod memory;
pub mod norm;
pub mod rope;
pub mod routing;
pub mod rows;
pub mod sdpa;
pub mod shape;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use crate::id::{ValueId, WeightId};
use crate::module::FusedDef;
use crate::ty::Type;
use law::Law;

pub use elementwise::{Add, Clamp, Gelu, GeluForm, Mul, Relu, Scale, Sigmoid, Silu, Softcap};
pub use embedding::Embedding;
pub use foreign::Foreign;
pub use fused::Fused;
pub use image::{Merge, Patches, Place};
pub use linear::Linear;
pub use memory::{Count, CrossSdpa, Gate};
pub use norm::{LayerNorm, RmsNorm};
pub use rope::{Rope, RopeScaling, RopeTable};
pub use routing::{Combine, Dispatch, GroupScore, Groups, Softmax, TopK};
pub use rows::{Append, Cut, Learned};
pub use sdpa::{Alibi, Sdpa};
pub use shape::{Concat, Repeat, Split};

/// What a node takes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operand {
    /// A value of the region.
    Value(ValueId),
    /// A weight of the region.
    Weight(WeightId),
}

impl Operand {
    /// The value, if it is one.
    pub fn value(self) -> Option<ValueId> {
        match self {
            Operand::Value(v) => Some(v),
            Operand::Weight(_) => None,
        }
    }

    /// The weight, if it is one.
    pub fn weight(self) -> Option<WeightId> {
        match self {
            Operand::Weight(w) => Some(w),
            Operand::Value(_) => None,
        }
    }
}

/// What an op expects at one operand position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// A value.
    Value,
    /// One or more values: the last slot only.
    Values,
    /// A weight.
    Weight,
    /// A weight that may be left out: trailing slots only.
    OptWeight,
    /// Whatever the fused body's parameters say.
    Signature,
}

/// Operands or attributes that do not fit an op.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OpError(pub String);

impl OpError {
    pub(crate) fn new<T>(message: impl Into<String>) -> Result<T, Self> {
        Err(Self(message.into()))
    }
}

/// The kind of model that an op was made for. Back ends cover ops by domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// Any language model; rows of images among its tokens are tokens to it.
    Text,
    /// Mixtures of experts.
    Experts,
    /// What sees images ([`crate::Module::eye`]), and attention of a text to what it sees.
    Images,
    /// Graphs of another system, before they are raised.
    Foreign,
}

/// What the rest of the language needs to know of an op. The fields of the implementing struct are its attributes, in
/// the order in which they print.
pub trait OpInfo: Clone + PartialEq + Serialize + DeserializeOwned {
    /// The word in the text form.
    const MNEMONIC: &'static str;
    /// What operands it takes.
    const OPERANDS: &'static [Slot];
    /// The kind of model that it was made for.
    const DOMAIN: Domain = Domain::Text;

    /// The result types, or why the operands do not fit. Operand count and kinds have been checked against
    /// [`OpInfo::OPERANDS`].
    ///
    /// # Errors
    /// A sentence that says what does not fit.
    fn infer(&self, operands: &[&Type], fused: &[FusedDef]) -> Result<Vec<Type>, OpError>;

    /// The equations between the log scales of operands, parameters and results.
    fn scale_law(&self, operands: &[&Type], results: &[&Type]) -> Vec<Law>;
}

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// An op with its attributes.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op { $($(#[$doc])* $name($name),)* }

        impl Op {
            /// Every mnemonic, in table order.
            pub const MNEMONICS: &'static [&'static str] = &[$(<$name as OpInfo>::MNEMONIC,)*];

            /// The word in the text form.
            pub fn mnemonic(&self) -> &'static str {
                match self { $(Op::$name(_) => <$name as OpInfo>::MNEMONIC,)* }
            }

            /// What operands it takes.
            pub fn slots(&self) -> &'static [Slot] {
                match self { $(Op::$name(_) => <$name as OpInfo>::OPERANDS,)* }
            }

            /// The kind of model that it was made for.
            pub fn domain(&self) -> Domain {
                match self { $(Op::$name(_) => <$name as OpInfo>::DOMAIN,)* }
            }

            /// The attributes in declared order, defaults left out.
            pub fn attributes(&self) -> Map<String, Json> {
                let json = match self { $(Op::$name(op) => serde_json::to_value(op),)* };
                match json {
                    Ok(Json::Object(map)) => map,
                    _ => Map::new(),
                }
            }

            /// The op of this mnemonic with these attributes.
            ///
            /// # Errors
            /// When there is no such op, or an attribute is unknown, missing or of the wrong kind.
            pub fn from_attributes(mnemonic: &str, attributes: Map<String, Json>) -> Result<Self, OpError> {
                match mnemonic {
                    $(<$name as OpInfo>::MNEMONIC => serde_json::from_value(Json::Object(attributes))
                        .map(Op::$name)
                        .map_err(|e| OpError(format!("attributes of {mnemonic}: {e}"))),)*
                    other => OpError::new(format!("`{other}` is not an op")),
                }
            }

            /// The result types, or why the operands do not fit. `weights[i]` says whether operand `i` is a weight.
            ///
            /// # Errors
            /// A sentence that says what does not fit.
            pub fn infer(&self, weights: &[bool], operands: &[&Type], fused: &[FusedDef]) -> Result<Vec<Type>, OpError> {
                check_slots(self.mnemonic(), self.slots(), weights)?;
                match self { $(Op::$name(op) => op.infer(operands, fused),)* }
            }

            /// The op's scale law.
            pub fn scale_law(&self, operands: &[&Type], results: &[&Type]) -> Vec<Law> {
                match self { $(Op::$name(op) => op.scale_law(operands, results),)* }
            }
        }

        $(impl From<$name> for Op { fn from(op: $name) -> Self { Op::$name(op) } })*
    };
}

/// Fails unless operands of these kinds (`true` for a weight) fit the slots.
pub(crate) fn check_slots(mnemonic: &str, slots: &[Slot], weights: &[bool]) -> Result<(), OpError> {
    let mut slots = slots.iter().peekable();
    for (i, weight) in weights.iter().enumerate() {
        let slot = match slots.peek() {
            Some(Slot::Values | Slot::Signature) => slots.peek().copied(),
            Some(_) => slots.next(),
            None => None,
        };
        let fits = match slot {
            None => return OpError::new(format!("{mnemonic} takes {i} operands, {} are given", weights.len())),
            Some(Slot::Value | Slot::Values) => !weight,
            Some(Slot::Weight | Slot::OptWeight) => *weight,
            Some(Slot::Signature) => true,
        };
        if !fits {
            let (want, got) = if *weight { ("value", "weight") } else { ("weight", "value") };
            return OpError::new(format!("operand {i} of {mnemonic} must be a {want}, a {got} is given"));
        }
    }
    match slots.next() {
        Some(Slot::Value | Slot::Weight) => OpError::new(format!("{mnemonic} misses operand {}", weights.len())),
        Some(Slot::Values | Slot::OptWeight | Slot::Signature) | None => Ok(()),
    }
}

ops! {
    /// Rows of a table, chosen by integers.
    Embedding,
    /// A matrix product with a weight.
    Linear,
    /// Root-mean-square normalisation.
    RmsNorm,
    /// Mean and variance normalisation.
    LayerNorm,
    /// The angles of rotary embedding.
    RopeTable,
    /// Rotary embedding.
    Rope,
    /// Scaled dot-product attention.
    Sdpa,
    /// x · sigmoid(x).
    Silu,
    /// 1 / (1 + e^−x).
    Sigmoid,
    /// Gaussian error linear unit.
    Gelu,
    /// max(x, 0).
    Relu,
    /// Sum.
    Add,
    /// Product.
    Mul,
    /// Product with a constant.
    Scale,
    /// c · tanh(x / c).
    Softcap,
    /// Limits on each number.
    Clamp,
    /// Channels cut into parts.
    Split,
    /// Channels joined.
    Concat,
    /// Channels over and over.
    Repeat,
    /// Shares that add up to 1.
    Softmax,
    /// The experts of each token.
    TopK,
    /// Tokens to their experts.
    Dispatch,
    /// What the experts say, added up.
    Combine,
    /// Squares of pixels as rows.
    Patches,
    /// Neighbouring patches joined.
    Merge,
    /// Images put among the tokens of a text.
    Place,
    /// Learned rows for each sequence.
    Learned,
    /// Rows after rows.
    Append,
    /// Some of the rows.
    Cut,
    /// How often a token came before.
    Count,
    /// Attention to one piece of a memory.
    CrossSdpa,
    /// Product with the tanh of a parameter.
    Gate,
    /// An op of another system that no rewrite has recognised yet.
    Foreign,
    /// A named op whose body is its meaning.
    Fused,
}

/// For `skip_serializing_if`: attributes at their default do not print.
pub(crate) fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

/// The channel count of an operand, or the error that it must be constant.
pub(crate) fn channels(ty: &Type) -> Result<u64, OpError> {
    ty.channels().ok_or_else(|| OpError(format!("the last axis of {ty} must be constant")))
}

/// Fails unless `ty` holds floats.
pub(crate) fn floats(what: &str, ty: &Type) -> Result<(), OpError> {
    if ty.elem.is_float() { Ok(()) } else { OpError::new(format!("{what} must hold floats, this is {ty}")) }
}

/// Fails unless `ty` is a float vector of `len`.
pub(crate) fn vector(what: &str, ty: &Type, len: u64) -> Result<(), OpError> {
    if ty.elem.is_float() && ty.rank() == 1 && ty.channels() == Some(len) {
        Ok(())
    } else {
        OpError::new(format!("{what} must be a float vector [{len}], this is {ty}"))
    }
}
