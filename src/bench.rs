//! Measuring speed: prompts and generation as llama-bench does it, and single products.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use awqc_cpu::kernels::{Line, OutTile, TILE};
use awqc_cpu::{Activations, Isa, Operand, Pool, Session, multiply};
use awqc_exec::Logits;
use awqc_exec::layout::r16::pack_codes;
use awqc_ir::Quant;
use awqc_ir::panels::Panels;
use half::f16;
use serde::Serialize;

use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::metrics::quantile;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// A prompt of so many tokens, `ppN`.
    Prompt(usize),
    /// So many tokens one by one, `tgN`.
    Generate(usize),
}

/// One row of results.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `pp512`, `tg128`, `tg128@d1024`.
    pub test: String,
    /// Tokens per second: mean over the repetitions.
    pub tokens_per_second: f64,
    /// Standard deviation over the repetitions.
    pub deviation: f64,
    /// Median over the repetitions.
    pub median: f64,
    /// Bytes of weights per second, for generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gigabytes_per_second: Option<f64>,
    /// The same as a share of what reading memory alone reaches, once that is known: see [`Row::compare`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_share: Option<f64>,
    /// Median and 99th percentile of the time of one token, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ms: Option<[f64; 2]>,
}

impl Row {
    /// Sets the share of what reading memory alone reaches, in gigabytes a second.
    pub fn compare(&mut self, bandwidth: f64) {
        self.bandwidth_share = self.gigabytes_per_second.map(|r| r / bandwidth);
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Mean, standard deviation and median.
fn statistics(samples: &[f64]) -> (f64, f64, f64) {
    let n = samples.len().max(1) as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let variance = samples.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt(), quantile(&sorted(samples), 0.5))
}

/// What can be measured.
pub trait Subject {
    /// Tokens that the model knows.
    fn vocabulary(&self) -> usize;

    /// Bytes of weights that every token reads.
    fn bytes_per_token(&self) -> usize;

    /// Forgets all earlier positions.
    fn reset(&mut self);

    /// Computes the logits of the last of `ids`, which continue what was seen.
    ///
    /// # Errors
    /// When there is too little room.
    fn run(&mut self, ids: &[i32]) -> Result<(), Failure>;

    /// Seconds that a device needs for the next token and its choice, again and again, where one runs the model: what
    /// is left when the processor has nothing to do with it.
    ///
    /// # Errors
    /// As [`Subject::run`].
    fn device_seconds(&mut self) -> Result<Option<f64>, Failure> {
        Ok(None)
    }
}

impl Subject for Session<'_> {
    fn vocabulary(&self) -> usize {
        self.vocabulary()
    }

    fn bytes_per_token(&self) -> usize {
        self.bytes_per_token()
    }

    fn reset(&mut self) {
        self.reset();
    }

    fn run(&mut self, ids: &[i32]) -> Result<(), Failure> {
        Ok(self.forward_each(ids, Logits::Last, &mut |_, _| ())?)
    }
}

impl Subject for awqc_cuda::Session {
    fn vocabulary(&self) -> usize {
        self.plan().vocabulary
    }

    fn bytes_per_token(&self) -> usize {
        self.plan().bytes_per_token
    }

    fn reset(&mut self) {
        self.reset();
    }

    fn run(&mut self, ids: &[i32]) -> Result<(), Failure> {
        self.forward(ids, Logits::Last)?;
        Ok(())
    }

    fn device_seconds(&mut self) -> Result<Option<f64>, Failure> {
        let mut samples = (0..5).map(|_| self.time_token(0, 20)).collect::<Result<Vec<_>, _>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples.get(2).copied())
    }
}

/// Runs one test: a warm-up, then `repetitions`. Generation starts behind `depth` positions.
///
/// # Errors
/// When the session has too little room, or the user interrupts.
pub fn measure(
    session: &mut dyn Subject,
    test: Test,
    depth: usize,
    repetitions: usize,
    interrupt: &Interrupt,
) -> Result<Row, Failure> {
    let mut rng = fastrand::Rng::with_seed(1);
    let vocabulary = i32::try_from(session.vocabulary()).unwrap_or(i32::MAX).max(1);
    let mut tokens = |n: usize| -> Vec<i32> { (0..n).map(|_| rng.i32(0..vocabulary)).collect() };
    let (mut speeds, mut times) = (Vec::new(), Vec::new());
    for repetition in 0..=repetitions {
        interrupt.check()?;
        session.reset();
        if depth > 0 {
            session.run(&tokens(depth))?;
        }
        let (count, start) = match test {
            Test::Prompt(n) => {
                let prompt = tokens(n);
                let start = Instant::now();
                session.run(&prompt)?;
                (n, start)
            }
            Test::Generate(n) => {
                let ids = tokens(n);
                let start = Instant::now();
                for id in &ids {
                    let one = Instant::now();
                    session.run(&[*id])?;
                    if repetition > 0 {
                        times.push(1e3 * one.elapsed().as_secs_f64());
                    }
                }
                (n, start)
            }
        };
        // The first is the warm-up.
        if repetition > 0 {
            speeds.push(count as f64 / start.elapsed().as_secs_f64());
        }
    }
    let (tokens_per_second, deviation, median) = statistics(&speeds);
    let name = match test {
        Test::Prompt(n) => format!("pp{n}"),
        Test::Generate(n) => format!("tg{n}"),
    };
    let read = (!times.is_empty()).then(|| 1e-9 * session.bytes_per_token() as f64 * median);
    Ok(Row {
        test: if depth > 0 { format!("{name}@d{depth}") } else { name },
        tokens_per_second,
        deviation,
        median,
        gigabytes_per_second: read,
        bandwidth_share: None,
        token_ms: (!times.is_empty()).then(|| [0.5, 0.99].map(|q| quantile(&sorted(&times), q))),
    })
}

/// Bytes of weights that [`kernel`] takes in turn: more than caches hold.
const ROTATED: usize = 256 << 20;

/// One product of [`kernels`].
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// The weight's type, such as `u4g128`.
    #[serde(rename = "type")]
    pub quant: String,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// Tokens.
    pub tokens: usize,
    /// The instruction set.
    pub isa: &'static str,
    /// What the activations were rounded to.
    pub act: &'static str,
    /// Median time in microseconds.
    pub microseconds: f64,
    /// Gigabytes of weights a second.
    pub gigabytes_per_second: f64,
    /// 10⁹ operations a second; a multiplication and an addition are two.
    pub gigaops: f64,
}

/// The shapes that [`kernels`] measures: the linears of a 7B Llama.
pub const SHAPES: [(usize, usize); 3] = [(4096, 4096), (11008, 4096), (4096, 11008)];

/// Measures a product with weights that no cache holds.
///
/// # Errors
/// When the shape is too large.
pub fn kernel(
    (rows, cols): (usize, usize),
    tokens: usize,
    quant: Quant,
    isa: Isa,
    act: Activations,
    threads: usize,
) -> Result<Kernel, Failure> {
    let shape = Panels::of(quant, rows, cols)
        .ok_or_else(|| Failure::new(Exit::Usage, format!("{quant}[{rows},{cols}] is too large")))?;
    let mut rng = fastrand::Rng::with_seed(1);
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u8(..) >> (8 - quant.bits)).collect();
    let scales = vec![f16::from_f32(0.01); rows * shape.groups()];
    let zeros = vec![shape.middle(); scales.len()];
    let bytes = pack_codes(&shape, &codes, &scales, &zeros);
    // Copies are used in turn, so that each is out of the cache when its turn comes.
    let copies: Vec<Vec<u8>> = (0..ROTATED.div_ceil(bytes.len()).clamp(1, 8)).map(|_| bytes.clone()).collect();
    let x: Vec<f32> = (0..tokens * cols).map(|_| rng.f32() - 0.5).collect();
    let form = act.of(tokens);
    let operands: Vec<Operand> = x
        .chunks(TILE * cols)
        .map(|x| {
            let mut operand = Operand::default();
            operand.fill(isa, form, &shape, x.len() / cols, x);
            operand
        })
        .collect();
    let operands: Vec<&Operand> = operands.iter().collect();
    let mut outs: Vec<Mutex<(Vec<f32>, Vec<Line>)>> = Vec::new();
    outs.resize_with(threads, Default::default);
    let mut pool = Pool::new(threads);
    let (mut times, begin) = (Vec::new(), Instant::now());
    for round in 0..200 {
        let weights = &copies[round % copies.len()];
        let start = Instant::now();
        pool.run(&|member| {
            let panels = member.share(shape.panels(), 1);
            let own = shape.panel_rows(panels.clone()).len();
            let mut out = outs[member.index].lock().unwrap_or_else(PoisonError::into_inner);
            let (out, room) = &mut *out;
            out.resize(tokens * own, 0.0);
            let out = OutTile::new(out, tokens, own, own);
            multiply(isa, &operands, &shape, weights, panels, room, out);
        });
        times.push(1e6 * start.elapsed().as_secs_f64());
        if round >= 4 && begin.elapsed().as_secs_f64() > 1.0 {
            break;
        }
    }
    // The first touches the memory.
    let microseconds = quantile(&sorted(&times[1..]), 0.5);
    Ok(Kernel {
        quant: quant.to_string(),
        rows,
        cols,
        tokens,
        isa: isa.name(),
        act: form.name(),
        microseconds,
        gigabytes_per_second: 1e-3 * bytes.len() as f64 / microseconds,
        gigaops: 2e-3 * (rows * cols * tokens) as f64 / microseconds,
    })
}
