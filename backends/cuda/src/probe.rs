//! Measuring single products on a device, with weights that no cache holds, each checked before it is timed.

use awqc_exec::layout::mma16;
use awqc_ir::Quant;
use awqc_ir::tiles::Tiles;
use awqc_passes::rtn::Codes;
use half::f16;

use crate::CudaError;
use crate::arch::Arch;
use crate::driver::{Address, Buffer, Device, Function, Launch};
use crate::emit::Source;
use crate::kernels::{Call, dequantize};
use crate::lower::{Product, product};
use crate::plan::{Given, Place};

/// Bytes of weights that are used in turn: more than caches hold.
const ROTATION: usize = 512 << 20;
/// The most copies of a weight.
const MOST: usize = 64;
/// What a result may be off by, relative to the largest: sums are in f32, nothing else is rounded.
const BOUND: f64 = 1e-4;

/// Gives the machine code of a kernel.
pub type Compile<'a> = dyn Fn(&Source, &Arch) -> Result<Vec<u8>, CudaError> + 'a;

/// How often a product is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeats {
    /// Products of a captured graph: its own start must cost little beside them.
    pub products: usize,
    /// Times that the graph is timed.
    pub samples: usize,
}

impl Default for Repeats {
    fn default() -> Self {
        Self { products: 128, samples: 9 }
    }
}

/// What a product took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Seconds of one product, in products that follow each other in one captured graph: the median over graphs.
    pub seconds: f64,
    /// Bytes of the weight.
    pub bytes: usize,
    /// The largest difference from what the processor computes, relative to the largest result.
    pub error: f64,
}

/// A packed weight on a device, in as many copies as fill its caches several times.
pub struct Probe {
    device: Device,
    arch: &'static Arch,
    shape: Tiles,
    label: String,
    /// The weight as numbers, `[rows, cols]`.
    numbers: Vec<f32>,
    copies: usize,
    stride: usize,
    weights: Buffer,
}

impl Probe {
    /// A weight of random codes and scales.
    ///
    /// # Errors
    /// When the device is of an unknown architecture or lacks memory, or the layout cannot hold the weight.
    pub fn new(device: &Device, quant: Quant, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let (major, minor) = device.capability();
        let arch = Arch::find(10 * major + minor)?;
        let shape = Tiles::of(quant, rows, cols).map_err(CudaError::Unsupported)?;
        let codes = random_codes(quant, rows, cols);
        let bytes = mma16::panels(&codes).map_err(|e| CudaError::Unsupported(e.0))?;
        let stride = bytes.len().next_multiple_of(256);
        let copies = ROTATION.div_ceil(bytes.len()).clamp(2, MOST);
        let weights = device.alloc("weights to measure with", stride * copies)?;
        device.upload(&weights, 0, &bytes)?;
        for copy in 1..copies {
            device.copy((&weights, 0), (&weights, copy * stride), bytes.len())?;
        }
        let label = format!("{quant}[{rows},{cols}]");
        Ok(Self { device: device.clone(), arch, shape, label, numbers: codes.decode(), copies, stride, weights })
    }

    /// Checks that the device reads the weight as the processor does: number by number, to the last bit.
    ///
    /// # Errors
    /// When it does not, or the device lacks memory or fails.
    pub fn check(&self, image: &Compile<'_>) -> Result<(), CudaError> {
        let source = dequantize::source(self.arch, &self.shape)?;
        let code = self.device.load(&image(&source, self.arch)?)?;
        let function = self.device.function(&code, &source.name, source.shared_bytes)?;
        let mut bytes = vec![0xff; 4 * self.numbers.len()];
        let out = self.device.alloc("a weight in f32", bytes.len())?;
        self.device.upload(&out, 0, &bytes)?;
        self.device.launch(&Launch {
            function: &function,
            grid: [self.shape.panels() as u32, 1, 1],
            threads: source.threads,
            shared_bytes: source.shared_bytes,
            args: &[self.weights.address(), self.weights.address(), out.address()],
        })?;
        self.device.download(&out, 0, &mut bytes)?;
        let got = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        let error = off(got.zip(self.numbers.iter().copied().map(f64::from)));
        if error > 0.0 {
            return Err(CudaError::Wrong { what: self.label.clone(), error, bound: 0.0 });
        }
        Ok(())
    }

    /// Checks and times the product with the activations of so many tokens.
    ///
    /// # Errors
    /// When the result is wrong, or the device lacks memory or fails.
    pub fn measure(&self, tokens: usize, repeats: Repeats, image: &Compile<'_>) -> Result<Timing, CudaError> {
        let product = product(self.arch, &self.shape, tokens)?;
        let mut functions: Vec<Option<Function>> = vec![None; product.kernels.len()];
        for at in product.launches.iter().map(|l| l.kernel) {
            let source = &product.kernels[at];
            let code = self.device.load(&image(source, self.arch)?)?;
            functions[at] = Some(self.device.function(&code, &source.name, source.shared_bytes)?);
        }
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let x = random_floats(tokens * cols);
        let arena = self.device.alloc("activations to measure with", product.arena_bytes)?;
        // Whatever is not computed is not a number.
        self.device.upload(&arena, 0, &vec![0xff; product.arena_bytes])?;
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.device.upload(&arena, product.x, &bytes)?;
        let call = self.device.alloc("a call", 4 * Call::WORDS)?;
        let mut words = [0u8; 4 * Call::WORDS];
        words[4 * Call::Tokens as usize..][..4].copy_from_slice(&(tokens as u32).to_le_bytes());
        self.device.upload(&call, 0, &words)?;
        let run = |copy: usize| self.run(&product, &functions, tokens, copy, [arena.address(), call.address()]);

        run(0)?;
        let mut bytes = vec![0u8; 4 * tokens * rows];
        self.device.download(&arena, product.y, &mut bytes)?;
        let y: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let error = self.error(&x, &y);
        // A NaN must fail.
        if error.is_nan() || error > BOUND {
            let what = format!("{} with {tokens} tokens", self.label);
            return Err(CudaError::Wrong { what, error, bound: BOUND });
        }

        let products = repeats.products.max(1);
        let graph = self.device.capture(|| (0..products).try_for_each(|i| run(i % self.copies)))?;
        self.device.replay(&graph)?;
        let mut samples = Vec::new();
        for _ in 0..repeats.samples.max(1) {
            samples.push(self.device.time(|| self.device.replay(&graph))?);
        }
        samples.sort_by(f64::total_cmp);
        let seconds = samples[samples.len() / 2] / products as f64;
        Ok(Timing { seconds, bytes: self.shape.total_bytes(), error })
    }

    fn run(
        &self,
        product: &Product,
        functions: &[Option<Function>],
        tokens: usize,
        copy: usize,
        [arena, call]: [Address; 2],
    ) -> Result<(), CudaError> {
        for launch in &product.launches {
            let kernel = &product.kernels[launch.kernel];
            let address = |place: &Place| match place {
                Place::Constant(_) => Ok(self.weights.address() + (copy * self.stride) as Address),
                Place::Arena(at) | Place::Stream(at, _) => Ok(arena + *at as Address),
                Place::Given(Given::Call) => Ok(call),
                Place::Cache(_) | Place::Images | Place::Given(_) => {
                    Err(CudaError::Unsupported(format!("a product by itself has no {place:?}")))
                }
            };
            let args = launch.args.iter().map(address).collect::<Result<Vec<_>, _>>()?;
            if let Some(function) = &functions[launch.kernel] {
                self.device.launch(&Launch {
                    function,
                    grid: launch.grid.map(|e| e.blocks(tokens)),
                    threads: kernel.threads,
                    shared_bytes: kernel.shared_bytes,
                    args: &args,
                })?;
            }
        }
        Ok(())
    }

    /// How far `y` is from `x Wᵀ`, relative to the largest: the sums of all tokens, each with a random sign, are
    /// compared (Freivalds' check). Every result counts, and the processor multiplies the weight with one row.
    fn error(&self, x: &[f16], y: &[f32]) -> f64 {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        let mut random = Random(7);
        let (mut sum_x, mut sum_y) = (vec![0f64; cols], vec![0f64; rows]);
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact(rows)) {
            let sign = if random.next() & 1 == 0 { 1.0 } else { -1.0 };
            sum_x.iter_mut().zip(x).for_each(|(s, v)| *s += sign * v.to_f64());
            sum_y.iter_mut().zip(y).for_each(|(s, v)| *s += sign * f64::from(*v));
        }
        let dot = |w: &[f32]| w.iter().zip(&sum_x).map(|(w, x)| f64::from(*w) * x).sum();
        off(sum_y.into_iter().zip(self.numbers.chunks_exact(cols).map(dot)))
    }
}

/// The largest difference of what was found from what is wanted, relative to the largest that is wanted; NaN is as far
/// as can be.
fn off(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (mut worst, mut largest) = (0f64, f64::MIN_POSITIVE);
    for (got, want) in pairs {
        let off = (got - want).abs();
        worst = if off.is_nan() { f64::INFINITY } else { worst.max(off) };
        largest = largest.max(want.abs());
    }
    worst / largest
}

/// A 64-bit linear congruential generator, of which the upper half is used.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// In `[0, 1)`.
    fn unit(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1u32 << 24) as f32
    }
}

fn random_codes(quant: Quant, rows: usize, cols: usize) -> Codes {
    let mut random = Random(1);
    let groups = rows * quant.group.count(cols);
    let middle = 1u8 << (quant.bits - 1);
    let codes = (0..rows * cols).map(|_| (random.next() >> (32 - u32::from(quant.bits))) as u8).collect();
    let scales = (0..groups).map(|_| f16::from_f32(0.005 + 0.01 * random.unit()).to_f32()).collect();
    let zero = |random: &mut Random| match quant.symmetric {
        true => middle,
        false => (random.next() >> (32 - u32::from(quant.bits))) as u8,
    };
    let zeros = (0..groups).map(|_| zero(&mut random)).collect();
    Codes { quant, rows, cols, codes, scales, zeros }
}

fn random_floats(n: usize) -> Vec<f16> {
    let mut random = Random(3);
    (0..n).map(|_| f16::from_f32(2.0 * random.unit() - 1.0)).collect()
}
