//! Targets: what can be compiled for. A target is data; `awqc targets` lists them.

use awqc_ir::{Group, Quant};

use crate::failure::{Exit, Failure};

/// What the emitter writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An artefact folder that awqc itself runs.
    Artefact,
    /// A Hugging Face folder in AutoAWQ's GEMM layout.
    HfAwq,
}

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What `--target` takes.
    pub name: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// The passes that it runs by default; `SCHEME` stands for the options of `quantize`.
    pub pipeline: &'static str,
    /// What is written.
    pub format: Format,
    /// The group size where none is asked for.
    pub group: u32,
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target {
        name: "reference",
        summary: "a fused artefact that awqc runs by decoding the weights to f32",
        pipeline: "canonicalize,dce,profile,awq-scale,awq-clip,quantize{SCHEME},\
                   fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce",
        format: Format::Artefact,
        group: 128,
    },
    Target {
        name: "hf-awq",
        summary: "a Hugging Face folder in AutoAWQ's GEMM layout, for transformers, vLLM and SGLang",
        pipeline: "profile,awq-scale,awq-clip,quantize{SCHEME}",
        format: Format::HfAwq,
        group: 128,
    },
];

impl Target {
    /// The target of this name.
    ///
    /// # Errors
    /// When there is none; the message lists all.
    pub fn find(name: &str) -> Result<&'static Target, Failure> {
        TARGETS.iter().find(|t| t.name == name).ok_or_else(|| {
            let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
            Failure::new(Exit::Unsupported, format!("there is no target `{name}`"))
                .help(format!("the targets are {}", names.join(", ")))
        })
    }

    /// The default pipeline for a quantization.
    pub fn pipeline(&self, quant: Quant) -> String {
        let group = match quant.group {
            Group::Size(g) => g.to_string(),
            Group::Row => "row".to_owned(),
        };
        let symmetric = if quant.symmetric { ",symmetric" } else { "" };
        self.pipeline.replace("SCHEME", &format!("bits={},group={group}{symmetric}", quant.bits))
    }
}
