//! Weights, launches and comparisons for the kernel tests.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use awqc_cuda::CudaError;
use awqc_cuda::driver::{Address, Buffer, Code, Device, Launch};
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::Call;
use awqc_ir::{Group, Quant};
use awqc_passes::rtn::Codes;
use half::f16;

use crate::emulator::{Emulator, on_device};

/// Numbers that differ from call to call and are the same in every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// Between −1 and 1.
    pub(crate) fn float(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// A weight with random codes, scales and zero points.
pub(crate) fn codes(bits: u8, symmetric: bool, group: Group, rows: usize, cols: usize) -> Codes {
    let quant = Quant { bits, symmetric, group };
    let mut random = Random::new(u64::from(bits) * 1000 + rows as u64);
    let groups = group.count(cols);
    let n = 1u64 << bits;
    Codes {
        quant,
        rows,
        cols,
        codes: (0..rows * cols).map(|_| random.below(n) as u8).collect(),
        scales: (0..rows * groups).map(|_| f16::from_f32(0.01 + 0.01 * random.float().abs()).to_f32()).collect(),
        zeros: (0..rows * groups).map(|_| if symmetric { (n / 2) as u8 } else { random.below(n) as u8 }).collect(),
    }
}

/// The weight as numbers.
pub(crate) fn decode(c: &Codes) -> Vec<f64> {
    let groups = c.quant.group.count(c.cols);
    let group = c.quant.group.len(c.cols).max(1);
    let at = |i: usize| {
        let (row, col) = (i / c.cols, i % c.cols);
        let g = row * groups + col / group;
        (f64::from(c.codes[i]) - f64::from(c.zeros[g])) * f64::from(c.scales[g])
    };
    (0..c.rows * c.cols).map(at).collect()
}

/// A device with some kernels.
pub(crate) struct Bench {
    pub(crate) device: Device,
    emulator: Emulator,
    /// Kernels that were launched: they stay loaded, for a device may be at work on them.
    loaded: RefCell<BTreeMap<String, Rc<Code>>>,
}

impl Bench {
    pub(crate) fn new<'a>(kernels: impl IntoIterator<Item = &'a Source>) -> Self {
        let emulator = Emulator::build(kernels);
        let device = emulator.device();
        Self { device, emulator, loaded: RefCell::default() }
    }

    /// The device once more, to be given away.
    pub(crate) fn another(&self) -> Device {
        self.emulator.device()
    }

    /// The machine code of a kernel, as it is handed to the device.
    pub(crate) fn image(&self, kernel: &Source) -> Result<Vec<u8>, CudaError> {
        self.emulator.image(&kernel.name)
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.device.alloc("a test", bytes.len()).expect("memory");
        self.device.upload(&buffer, 0, bytes).expect("an upload");
        buffer
    }

    pub(crate) fn f32(&self, values: &[f32]) -> Buffer {
        self.bytes(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn f16(&self, values: &[f32]) -> Buffer {
        self.bytes(&values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn u32(&self, values: &[u32]) -> Buffer {
        self.bytes(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// The array that describes a call.
    pub(crate) fn call(&self, tokens: usize, past: usize) -> Buffer {
        let mut words = [0; Call::WORDS];
        words[Call::Tokens as usize] = tokens as u32;
        words[Call::Past as usize] = past as u32;
        self.u32(&words)
    }

    pub(crate) fn launch(&self, kernel: &Source, grid: [u32; 3], args: &[Address]) {
        assert_eq!(args.len(), kernel.args, "{}", kernel.name);
        let mut loaded = self.loaded.borrow_mut();
        let load = || self.device.load(&self.image(kernel).expect("an image")).expect("code");
        let code = loaded.entry(kernel.name.clone()).or_insert_with(load);
        let function = self.device.function(code, &kernel.name, kernel.shared_bytes).expect("a kernel");
        let launch =
            Launch { function: &function, grid, threads: kernel.threads, shared_bytes: kernel.shared_bytes, args };
        self.device.launch(&launch).expect("a launch");
    }

    pub(crate) fn read_f32(&self, buffer: &Buffer) -> Vec<f32> {
        let mut bytes = vec![0; buffer.bytes()];
        self.device.download(buffer, 0, &mut bytes).expect("a download");
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub(crate) fn read_f16(&self, buffer: &Buffer) -> Vec<f32> {
        let mut bytes = vec![0; buffer.bytes()];
        self.device.download(buffer, 0, &mut bytes).expect("a download");
        bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
    }
}

/// The largest difference, relative to the largest of `want`; NaN counts as infinite. On the machine's own device an
/// eighth of it: tensor cores and functions round there in ways of their own.
pub(crate) fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs());
    worst.fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
        / (scale * if on_device() { 8.0 } else { 1.0 })
}

/// What f16 keeps of these.
pub(crate) fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| f16::from_f32(*v).to_f32()).collect()
}
