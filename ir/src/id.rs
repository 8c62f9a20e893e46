//! Typed ids into a region's arenas. An id is never reused within its region.

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident $sigil:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(u32);

        impl $name {
            /// The id of the entry at `index` of its arena.
            pub fn new(index: usize) -> Self {
                Self(u32::try_from(index).expect("an arena holds fewer than 2^32 entries"))
            }

            /// The position in the arena.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($sigil, "{}"), self.0)
            }
        }
    )*};
}

ids! {
    /// A node: one application of an op.
    NodeId "n";
    /// A value: a region parameter or a node's result.
    ValueId "%";
    /// A weight: a lazy expression over checkpoint tensors.
    WeightId "$";
    /// A data entry: numbers that a pass made (scale vectors, clip bounds).
    DataId "#";
}
