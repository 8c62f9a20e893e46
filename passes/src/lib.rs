//! awqc-passes

pub mod exec;
pub mod facts;
pub mod pass;
pub mod remark;
pub mod rtn;

pub use exec::{ExecError, Executor, Tensor};
pub use facts::{Facts, InputStats};
pub use pass::{Budget, Changed, Fidelity, Pass, PassCx, PassError};
pub use remark::{Remark, RemarkKind, Remarks};
