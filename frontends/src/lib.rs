//! Front ends: from a checkpoint to a module.
//!
//! [`open`] takes a path and gives the whole model as IR, a source for its tensors, its configuration, and the files
//! that go with it. Formats are read by [`safetensors`], [`pickle`], [`gguf`] and `onnx`, and packed weights of other
//! programs by `quantized`; what a model *is* stands in one file for each family, `arch/FAMILY.awqir`: a template in
//! the IR's own text, after a few directives ([`family`]).
//!
//! Nothing is believed before it is checked: headers against the size of the file, tensors against the template,
//! the configuration against what the family needs. Tensors are read one at a time, when somebody asks for them.

mod arch;
mod artefact;
mod error;
pub mod family;
mod file;
mod folder;
pub mod gguf;
mod onnx;
mod open;
mod parts;
pub mod pickle;
mod quantized;
mod random;
pub mod safetensors;
mod shards;
mod synthetic;
mod view;

pub use artefact::{MODULE, WEIGHTS};
pub use error::{ImportError, Problems};
pub use family::{ArchInfo, archs};
pub use open::{CONFIG, Contents, ExtraFile, Imported, Kind, open};
pub use random::open_random;
