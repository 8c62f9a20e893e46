//! The architectures that can be compiled for, as data.

use crate::CudaError;

/// One architecture. Sizes are those of NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications per
/// Compute Capability"; multiprocessors and bandwidth are those of the data sheet of one device, the first of
/// `summary`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability times ten: what follows `sm_`.
    pub sm: u32,
    /// One line for people.
    pub summary: &'static str,
    /// Bytes of shared memory that one block can ask for.
    pub shared_bytes: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_bytes_sm: usize,
    /// Warps that a multiprocessor holds at once.
    pub warps_sm: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers_sm: usize,
    /// The most registers of a thread.
    pub registers_thread: usize,
    /// Multiprocessors of the typical device.
    pub multiprocessors: usize,
    /// What its memory delivers in a second, in 10⁹ bytes.
    pub gigabytes_per_second: usize,
    /// Shapes `(m, n, k)` of the tensor-core products of f16 with sums in f32.
    pub mma: &'static [(usize, usize, usize)],
}

const MMA: &[(usize, usize, usize)] = &[(16, 8, 8), (16, 8, 16)];

/// Every architecture.
pub const ARCHS: &[Arch] = &[
    Arch {
        sm: 80,
        summary: "Ampere for data centres: A100, A30",
        shared_bytes: 163 << 10,
        shared_bytes_sm: 164 << 10,
        warps_sm: 64,
        registers_sm: 64 << 10,
        registers_thread: 255,
        multiprocessors: 108,
        gigabytes_per_second: 1555,
        mma: MMA,
    },
    Arch {
        sm: 86,
        summary: "Ampere: RTX 3090 and others of that series, A10, A40",
        shared_bytes: 99 << 10,
        shared_bytes_sm: 100 << 10,
        warps_sm: 48,
        registers_sm: 64 << 10,
        registers_thread: 255,
        multiprocessors: 82,
        gigabytes_per_second: 936,
        mma: MMA,
    },
    Arch {
        sm: 89,
        summary: "Ada: RTX 4090 and others of that series, L4, L40",
        shared_bytes: 99 << 10,
        shared_bytes_sm: 100 << 10,
        warps_sm: 48,
        registers_sm: 64 << 10,
        registers_thread: 255,
        multiprocessors: 128,
        gigabytes_per_second: 1008,
        mma: MMA,
    },
    Arch {
        sm: 90,
        summary: "Hopper: H100, H200",
        shared_bytes: 227 << 10,
        shared_bytes_sm: 228 << 10,
        warps_sm: 64,
        registers_sm: 64 << 10,
        registers_thread: 255,
        multiprocessors: 132,
        gigabytes_per_second: 3350,
        mma: MMA,
    },
];

impl Arch {
    /// The architecture `sm_NN`.
    ///
    /// # Errors
    /// When kernels were never compiled for it; the message lists those that there are.
    pub fn find(sm: u32) -> Result<&'static Arch, CudaError> {
        ARCHS.iter().find(|a| a.sm == sm).ok_or(CudaError::Arch(sm))
    }

    /// `sm_89`.
    pub fn name(&self) -> String {
        format!("sm_{}", self.sm)
    }

    /// Whether a device of compute capability `(major, minor)` runs cubins of this architecture: same major version,
    /// same minor or a later one (CUDA C++ Programming Guide, "Binary Compatibility").
    pub fn runs_on(&self, (major, minor): (u32, u32)) -> bool {
        self.sm / 10 == major && self.sm % 10 <= minor
    }

    /// All architectures, for messages.
    pub fn names() -> String {
        ARCHS.iter().map(Arch::name).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubins_run_within_a_major_version() {
        let ampere = Arch::find(86).unwrap();
        assert!(ampere.runs_on((8, 6)) && ampere.runs_on((8, 9)));
        assert!(!ampere.runs_on((8, 0)) && !ampere.runs_on((9, 0)));
        let error = Arch::find(75).unwrap_err().to_string();
        assert!(error.contains("sm_75") && error.contains("sm_80, sm_86, sm_89, sm_90"), "{error}");
    }

    #[test]
    fn every_architecture_has_the_product_that_the_kernels_use() {
        assert!(ARCHS.iter().all(|a| a.mma.contains(&(16, 8, 16)) && a.shared_bytes <= a.shared_bytes_sm));
    }
}
