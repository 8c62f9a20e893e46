//! The list of family files under `arch/`: the one line to add for a new family.

macro_rules! files {
    ($($name:literal,)*) => {
        /// Every family file: its name and text.
        pub(crate) const FILES: &[(&str, &str)] =
            &[$((concat!($name, ".awqir"), include_str!(concat!("../arch/", $name, ".awqir"))),)*];
    };
}

files! {
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "llava",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "openflamingo",
    "opt",
    "opt_postnorm",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vila",
}
