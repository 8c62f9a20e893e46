//! awqc-passes

pub mod analysis;
pub mod awq;
pub mod awq_clip;
pub mod awq_scale;
pub mod canonicalize;
pub mod dce;
pub mod dense;
pub mod diff;
pub mod exec;
pub mod facts;
pub mod fuse_gate_up;
pub mod fuse_norm;
pub mod fuse_qkv;
pub mod fuse_rope;
pub mod fuse_swiglu;
pub mod gptq;
pub mod instrument;
pub mod manager;
pub mod pack;
pub mod pass;
pub mod pipeline;
pub mod profile;
pub mod quantize;
pub mod quantize_head;
pub mod registry;
pub mod remark;
pub mod rewrite;
pub mod rtn;
pub mod tune;

pub use exec::{Afterwards, ExecError, Executor, Tensor};
pub use facts::{Facts, InputStats};
pub use manager::{Manager, ManagerError, ModuleCx, RegionReport};
pub use pass::{Budget, Changed, Fidelity, Pass, PassCx, PassError};
pub use pipeline::{Pipeline, PipelineError};
pub use registry::{DynPass, PassInfo, Registry};
pub use remark::{Remark, RemarkKind, Remarks};
