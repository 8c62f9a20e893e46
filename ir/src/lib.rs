//! awqc-ir

pub mod diag;
pub mod id;
pub mod module;
pub mod op;
pub mod region;
pub mod tensor;
pub mod text;
pub mod ty;
pub mod verify;
pub mod weight;

pub use diag::{Diagnostic, Diagnostics, Place, Show, Span};
pub use id::{DataId, NodeId, ValueId, WeightId};
pub use module::{FusedDef, Module};
pub use op::{Op, OpError, OpInfo, Operand};
pub use region::{Data, Def, Node, Region, RegionName, Uses, Value};
pub use tensor::{RawTensor, Stored, TensorError, TensorInfo, TensorSource};
pub use text::{Env, NoEnv, parse, parse_with, print, print_region};
pub use ty::{Dim, Elem, Group, Layout, Name, Quant, Type};
pub use verify::{Stage, Verified, verify, verify_stage};
pub use weight::{DataMap, DataRef, Weight, WeightExpr};
