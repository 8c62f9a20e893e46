//! The bits of a code as an option: one width, or the mean of several.

use awqc_ir::Quant;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::pass::PassError;

/// `bits` in the text of a pipeline: a whole number is one width for all, unless `mixed` is set; a fraction is a mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BitsOption(pub f64);

impl BitsOption {
    /// The width, if the number is one that a code can have.
    pub fn width(self) -> Option<u8> {
        Quant::BITS.into_iter().find(|b| f64::from(*b) == self.0)
    }

    /// Whether it can only be a mean.
    pub fn is_fraction(self) -> bool {
        self.0.fract() != 0.0
    }
}

impl Default for BitsOption {
    fn default() -> Self {
        Self(4.0)
    }
}

impl Serialize for BitsOption {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.width() {
            Some(width) => serializer.serialize_u8(width),
            None => serializer.serialize_f64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for BitsOption {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).map(Self).map_err(|_| de::Error::custom("bits is a number"))
    }
}

/// A mean of bits to be spread over the linears of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    /// The most that a quantized weight's elements may take on the mean, scales and zero points not counted.
    pub mean: f64,
    /// The widths that a linear may get, ascending.
    pub widths: Vec<u8>,
}

impl Mixture {
    /// A mean of these widths; of all that there are, if none are given.
    ///
    /// # Errors
    /// When a width is none that a code can have, or the mean lies outside of them.
    pub(super) fn new(mean: f64, widths: Option<&[u8]>) -> Result<Self, PassError> {
        let mut widths = widths.unwrap_or(&Quant::BITS).to_vec();
        widths.sort_unstable();
        widths.dedup();
        if let Some(odd) = widths.iter().find(|w| !Quant::BITS.contains(w)) {
            return Err(PassError::Refused(format!("widths: {odd} is not possible, use 2, 3, 4 or 8")));
        }
        let (Some(low), Some(high)) = (widths.first(), widths.last()) else {
            return Err(PassError::Refused("widths: at least one of 2, 3, 4 and 8 is needed".into()));
        };
        if !(f64::from(*low)..=f64::from(*high)).contains(&mean) {
            return Err(PassError::Refused(format!(
                "a mean of {mean} bits is not possible with widths {low} to {high}"
            )));
        }
        Ok(Self { mean, widths })
    }
}
