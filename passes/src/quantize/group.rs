//! The group size as an option: a number, or the word `row`.

use awqc_ir::Group;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A group size in the text of a pipeline: `128`, or `row` (also `0`) for one scale a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOption(pub Group);

impl Default for GroupOption {
    fn default() -> Self {
        Self(Group::Size(128))
    }
}

impl Serialize for GroupOption {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Group::Size(n) => serializer.serialize_u32(n),
            Group::Row => serializer.serialize_str("row"),
        }
    }
}

impl<'de> Deserialize<'de> for GroupOption {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u32),
            Word(String),
        }
        let wrong = || de::Error::custom("a group is a number of elements, or `row`");
        match Raw::deserialize(deserializer).map_err(|_| wrong())? {
            Raw::Number(0) => Ok(Self(Group::Row)),
            Raw::Number(n) => Ok(Self(Group::Size(n))),
            Raw::Word(w) if w == "row" => Ok(Self(Group::Row)),
            Raw::Word(_) => Err(wrong()),
        }
    }
}
