//! Ops of other systems, on their way into this language.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::law::{Law, Port};
use super::{Domain, OpError, OpInfo, Slot};
use crate::module::FusedDef;
use crate::ty::Type;

/// `foreign x, … {op=NAME}`: an op of another system, under the name and with the attributes that it has there.
///
/// Front ends for formats that know no attention and no norms, only products and sums, write these, and rewrites
/// (`awqc_passes::raise`) recognise the ops of this language in them. It has no meaning of its own: the verifier
/// refuses a module in which one is left (V15), so no back end meets one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Foreign {
    /// What the other system calls it.
    pub op: String,
    /// The types of the results. If there are none, one result has the type of the first operand.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "in_words")]
    pub results: Vec<Type>,
    /// All other attributes.
    #[serde(flatten)]
    pub attributes: Map<String, Json>,
}

/// Types as they print.
mod in_words {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::ty::Type;

    pub(super) fn serialize<S: Serializer>(types: &[Type], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(types.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Type>, D::Error> {
        let words = Vec::<String>::deserialize(d)?;
        words.iter().map(|w| w.parse()).collect::<Result<_, _>>().map_err(serde::de::Error::custom)
    }
}

impl OpInfo for Foreign {
    const MNEMONIC: &'static str = "foreign";
    const OPERANDS: &'static [Slot] = &[Slot::Signature];
    const DOMAIN: Domain = Domain::Foreign;

    fn infer(&self, operands: &[&Type], _: &[FusedDef]) -> Result<Vec<Type>, OpError> {
        match (self.results.as_slice(), operands.first()) {
            ([], Some(first)) => Ok(vec![(*first).clone()]),
            ([], None) => OpError::new("a foreign op without operands needs the types of its results"),
            (results, _) => Ok(results.to_vec()),
        }
    }

    /// Nothing is known of it, so nothing may be scaled.
    fn scale_law(&self, operands: &[&Type], results: &[&Type]) -> Vec<Law> {
        let operands = (0..operands.len()).map(|i| Law::Pin(Port::Operand(i)));
        operands.chain((0..results.len()).map(|i| Law::Pin(Port::Result(i)))).collect()
    }
}
