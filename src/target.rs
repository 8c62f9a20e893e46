//! Targets: what can be compiled for. A target is data; `awqc targets` lists them.

use awqc_cpu::Isa;
use awqc_ir::{Group, Quant};

use crate::failure::{Exit, Failure};

/// How codes are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// The nearest codes, without calibration
    Rtn,
    /// The search of the AWQ paper as its authors published it
    Paper,
    /// Scales and clip bounds by activations, then the nearest codes
    #[default]
    Awq,
    /// Codes one after the other, each making up for the errors so far
    Gptq,
    /// Scales and clip bounds by activations, then codes one after the other
    AwqGptq,
    /// The same, then all scales tuned by what the model predicts
    Best,
}

/// How much work goes into a good result: names for methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quality {
    /// `awq`: minutes
    Fast,
    /// `paper`: to compare with
    Paper,
    /// `best`: a quarter of an hour for a small model
    Best,
}

impl Quality {
    /// The method that it names.
    pub fn method(self) -> Method {
        match self {
            Quality::Fast => Method::Awq,
            Quality::Paper => Method::Paper,
            Quality::Best => Method::Best,
        }
    }
}

impl Method {
    /// What `--method` takes.
    pub fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Paper => "paper",
            Method::Awq => "awq",
            Method::Gptq => "gptq",
            Method::AwqGptq => "awq-gptq",
            Method::Best => "best",
        }
    }

    /// The passes before `quantize`, with a comma behind each.
    fn search(self) -> &'static str {
        match self {
            Method::Rtn => "",
            Method::Gptq => "profile,",
            Method::Paper => "profile,awq-scale{mode=reference},awq-clip{mode=reference,skip=scores},",
            Method::Awq | Method::AwqGptq | Method::Best => "profile,awq-scale{bounds=64},awq-clip,",
        }
    }

    /// What it adds to the options of `quantize`.
    fn options(self) -> &'static str {
        match self {
            Method::Rtn | Method::Paper | Method::Awq => "",
            Method::Gptq => ",method=gptq",
            // More damping than is published: what compensation then wins, it wins on other kinds of text too, see
            // docs/quality.md.
            Method::AwqGptq | Method::Best => ",method=gptq,damp=0.3",
        }
    }

    /// The passes between `quantize` and those that follow, with a comma before each.
    fn refinement(self) -> &'static str {
        match self {
            Method::Rtn | Method::Paper | Method::Awq | Method::Gptq | Method::AwqGptq => "",
            Method::Best => ",tune",
        }
    }
}

/// What the emitter writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An artefact folder that awqc itself runs.
    Artefact,
    /// A Hugging Face folder in AutoAWQ's GEMM layout.
    HfAwq,
}

/// What a target for CPUs says of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The instruction set that they use; the best that the machine has, if it does not say.
    pub isa: Option<Isa>,
}

/// Widths that differ from linear to linear, in place of the one width of a [`Quant`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mixed {
    /// The most that an element of a quantized weight may take on the mean.
    pub mean: f64,
    /// The widths that are mixed; all that there are if not given.
    pub widths: Option<Vec<u8>>,
}

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What `--target` takes.
    pub name: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// The passes that it runs by default; `SEARCH,` stands for the passes before `quantize` that the method needs,
    /// `SCHEME` for the options of `quantize`, `REFINE` for what the method does behind it, `HEAD,` for the pass that rounds the output head.
    pub pipeline: &'static str,
    /// What is written.
    pub format: Format,
    /// The group size where none is asked for.
    pub group: u32,
    /// For artefacts that the packed kernels run.
    pub cpu: Option<Cpu>,
    /// For artefacts with kernels for GPUs: the architecture, 89 for `sm_89`.
    pub cuda: Option<u32>,
}

/// The passes that choose the codes.
macro_rules! quantize {
    () => {
        "canonicalize,dce,SEARCH,quantize{SCHEME}REFINE"
    };
}

/// The passes that join operators.
macro_rules! fuse {
    () => {
        "fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce"
    };
}

/// A CPU target. All have one layout, so that every machine runs every artefact; they differ in the instructions that
/// the kernels may use.
const fn cpu(name: &'static str, summary: &'static str, isa: Option<Isa>) -> Target {
    Target {
        name,
        summary,
        pipeline: concat!(quantize!(), ",HEAD,", fuse!(), ",pack{layout=r16}"),
        format: Format::Artefact,
        group: 128,
        cpu: Some(Cpu { isa }),
        cuda: None,
    }
}

/// A CUDA target. All have one layout; they differ in the machine code beside the weights.
const fn cuda(name: &'static str, summary: &'static str, sm: u32) -> Target {
    Target {
        name,
        summary,
        pipeline: concat!(quantize!(), ",HEAD,", fuse!(), ",pack{layout=mma16}"),
        format: Format::Artefact,
        group: 128,
        cpu: None,
        cuda: Some(sm),
    }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    cpu("cpu-native", "packed kernels, with whatever the machine has that runs them", None),
    cpu("cpu-avx2", "packed kernels for AVX2", Some(Isa::Avx2)),
    cpu("cpu-avx512", "packed kernels for AVX-512", Some(Isa::Avx512)),
    cpu("cpu-avx512vnni", "packed kernels for AVX-512 with VNNI", Some(Isa::Avx512Vnni)),
    cpu("cpu-amx", "packed kernels for AVX-512 with VNNI, and AMX for many tokens", Some(Isa::Amx)),
    cpu("cpu-neon", "packed kernels for 64-bit ARM", Some(Isa::Neon)),
    cpu("cpu-neon-dotprod", "packed kernels for 64-bit ARM with dot products", Some(Isa::NeonDotprod)),
    cpu(
        "cpu-neon-i8mm",
        "packed kernels for 64-bit ARM with dot products and 8-bit matrix products",
        Some(Isa::NeonI8mm),
    ),
    cuda("cuda-sm80", "CUDA kernels for Ampere in data centres: A100, A30", 80),
    cuda("cuda-sm86", "CUDA kernels for Ampere: RTX 30, A10, A40", 86),
    cuda("cuda-sm89", "CUDA kernels for Ada: RTX 40, L4, L40", 89),
    cuda("cuda-sm90", "CUDA kernels for Hopper: H100, H200", 90),
    Target {
        name: "reference",
        summary: "a fused artefact that awqc runs by decoding the weights to f32",
        pipeline: concat!(quantize!(), ",", fuse!()),
        format: Format::Artefact,
        group: 128,
        cpu: None,
        cuda: None,
    },
    Target {
        name: "hf-awq",
        summary: "a Hugging Face folder in AutoAWQ's GEMM layout, for transformers, vLLM and SGLang",
        pipeline: "SEARCH,quantize{SCHEME}REFINE",
        format: Format::HfAwq,
        group: 128,
        cpu: None,
        cuda: None,
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

    /// The passes that it runs by default, for people: `SCHEME` and `HEAD` stay as they are.
    pub fn listed(&self) -> String {
        outline(self.pipeline, Method::default())
    }

    /// The default pipeline for a quantization; a head of 16 bits stays as it is.
    pub fn pipeline(&self, method: Method, quant: Quant, head_bits: u8) -> String {
        fill(self.pipeline, method, quant, head_bits)
    }
}

/// A pipeline with what a method does; `SCHEME` stays for the quantization, and `HEAD,` as it is.
pub fn outline(pipeline: &str, method: Method) -> String {
    let scheme = format!("SCHEME{}", method.options());
    let pipeline = pipeline.replace("SEARCH,", method.search()).replace("REFINE", method.refinement());
    pipeline.replace("SCHEME", &scheme)
}

/// A pipeline with `SEARCH,`, `SCHEME`, `REFINE` and `HEAD,` replaced, see [`Target::pipeline`].
pub fn fill(pipeline: &str, method: Method, quant: Quant, head_bits: u8) -> String {
    fill_mixed(pipeline, method, quant, None, head_bits)
}

/// The same, with mixed widths in place of the quantization's own, if there are.
pub fn fill_mixed(pipeline: &str, method: Method, quant: Quant, mixed: Option<&Mixed>, head_bits: u8) -> String {
    let group = match quant.group {
        Group::Size(g) => g.to_string(),
        Group::Row => "row".to_owned(),
    };
    let symmetric = if quant.symmetric { ",symmetric" } else { "" };
    let head = if head_bits < 16 { format!("quantize-head{{bits={head_bits},group={group}}},") } else { String::new() };
    let bits = match mixed {
        None => quant.bits.to_string(),
        Some(Mixed { mean, widths: None }) => format!("{mean},mixed"),
        Some(Mixed { mean, widths: Some(widths) }) => {
            format!("{mean},mixed,widths=[{}]", widths.iter().map(u8::to_string).collect::<Vec<_>>().join(","))
        }
    };
    let scheme = format!("bits={bits},group={group}{symmetric}{}", method.options());
    // Nothing can be spread without what `profile` measures.
    let search = match method {
        Method::Rtn if mixed.is_some() => "profile,",
        Method::Rtn | Method::Paper | Method::Awq | Method::Gptq | Method::AwqGptq | Method::Best => method.search(),
    };
    let pipeline = pipeline.replace("SEARCH,", search).replace("REFINE", method.refinement());
    pipeline.replace("HEAD,", &head).replace("SCHEME", &scheme)
}
