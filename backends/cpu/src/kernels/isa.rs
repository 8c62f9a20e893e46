//! The instruction sets that there are kernels for, and which of them the machine has.

use std::fmt;
use std::str::FromStr;

/// An instruction set. All names exist on every machine; which ones work is found at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, the specification of all others. Slow.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// The same, with AMX for products with many tokens.
    Amx,
    /// ARM NEON, as every 64-bit ARM has it.
    Neon,
    /// ARM NEON with the dot product instructions.
    NeonDotprod,
    /// ARM NEON with the dot product and the 8-bit matrix product instructions.
    NeonI8mm,
}

impl Isa {
    /// All of them; of two that one machine has, the faster one comes later.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Amx,
        Self::Neon,
        Self::NeonDotprod,
        Self::NeonI8mm,
    ];

    /// The fastest one that the machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }

    /// Those that the machine has, the fastest last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether the machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => crate::kernels::x86::has_avx2(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => crate::kernels::x86::has_avx512(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => crate::kernels::x86::has_avx512vnni(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::kernels::x86::has_amx(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => crate::kernels::arm::has_neon(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => crate::kernels::arm::has_dotprod(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => crate::kernels::arm::has_i8mm(),
            #[allow(unreachable_patterns, reason = "the arms above depend on the architecture")]
            _ => false,
        }
    }

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
        }
    }

    /// What the kernels' safety rests on: without it they must not run.
    pub(crate) fn expect_available(self) {
        assert!(self.is_available(), "this machine has no {self}");
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no instruction set has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa(pub String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no instruction set is called {:?}; there are", self.0)?;
        Isa::ALL.iter().try_for_each(|isa| write!(f, " {isa}"))
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| UnknownIsa(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let message = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(message.contains("sse9") && message.contains("neon-dotprod"), "{message}");
    }

    #[test]
    fn the_detected_one_is_available() {
        assert!(Isa::detect().is_available());
        assert_eq!(Isa::available().last(), Some(&Isa::detect()));
    }
}
