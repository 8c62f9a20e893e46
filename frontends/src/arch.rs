//! The list of family files under `arch/`: the one line to add for a new family.

macro_rules! files {
    ($($name:literal,)*) => {
        /// Every family file: its name and text.
        pub(crate) const FILES: &[(&str, &str)] =
            &[$((concat!($name, ".awqir"), include_str!(concat!("../arch/", $name, ".awqir"))),)*];
    };
}

files! {
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "mistral",
    "opt",
    "opt_postnorm",
    "qwen2",
    "qwen3",
}
