//! What the tests of this crate share: a naive evaluator in f64, and an executor over it with made-up weights.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod eval;

use std::collections::{BTreeMap, BTreeSet};

use awqc_ir::{FusedDef, Region, ValueId, WeightId};
use awqc_passes::{
    Afterwards, Budget, Changed, ExecError, Executor, Facts, InputStats, Pass, PassCx, PassError, Remarks, Scheme,
    Tensor,
};

use eval::{Matrix, Run};

/// For passes that ask nothing of the outside world.
pub struct Nothing;

impl Executor for Nothing {
    fn realize(&self, _: &Region, _: WeightId) -> Result<Tensor, ExecError> {
        Err(ExecError::Unavailable("nothing runs here".into()))
    }

    fn profile(
        &mut self,
        _: &Region,
        _: &[FusedDef],
        _: &[ValueId],
        _: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        Err(ExecError::Unavailable("nothing runs here".into()))
    }

    fn evaluate(&self, _: &Region, _: &[FusedDef], _: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        Err(ExecError::Unavailable("nothing runs here".into()))
    }
}

/// A region from the body of a layer, in text.
pub fn layer(body: &str) -> Region {
    let text = format!("awqir 1\nmodel \"test\" {{ dtype=\"f32\" }}\ndim B, S\n\n{body}\n");
    let mut module = awqc_ir::parse(&text).unwrap_or_else(|e| panic!("{e}"));
    module.regions.remove(0)
}

/// Numbers in (−1, 1) that depend on `name` only.
pub fn noise(name: &str, n: usize) -> Vec<f32> {
    let mut x = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..8).for_each(|_| {
        next();
    });
    (0..n).map(|_| next()).collect()
}

/// An executor over the naive evaluator: weights are made from their names, inputs from the names of the parameters.
pub struct Naive {
    /// Tokens of a calibration run.
    pub tokens: usize,
    /// Replaces made-up weights.
    pub weights: BTreeMap<String, Vec<f32>>,
}

impl Naive {
    pub fn new(tokens: usize) -> Self {
        Self { tokens, weights: BTreeMap::new() }
    }

    pub fn run<'a>(&'a self, region: &'a Region) -> Run<'a> {
        let made = |name: &str, shape: &[usize]| {
            let n = shape.iter().product();
            match self.weights.get(name) {
                Some(w) => w.clone(),
                // A vector is a gain or a bias, a matrix is scaled so that outputs stay around 1.
                None if shape.len() == 1 => noise(name, n).iter().map(|v| 1.0 + 0.3 * v).collect(),
                None => noise(name, n).iter().map(|v| v * (3.0 / shape[1] as f32).sqrt()).collect(),
            }
        };
        Run::new(region, Box::new(made), self.inputs(region))
    }

    /// Channel 1 and every 17th carry outliers.
    fn inputs(&self, region: &Region) -> BTreeMap<ValueId, Matrix> {
        let mut out = BTreeMap::new();
        for v in region.value_params() {
            let value = region.value(v);
            let cols = value.ty.channels().unwrap() as usize;
            let loud = |c: usize| if value.ty.rank() == 3 && c % 17 == 1 { 12.0 } else { 1.0 };
            let data = noise(&value.name, self.tokens * cols);
            let data = data.iter().enumerate().map(|(i, v)| f64::from(*v) * loud(i % cols)).collect();
            out.insert(v, Matrix { cols, data });
        }
        out
    }
}

impl Executor for Naive {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        let (shape, data) = self.run(region).weight(weight);
        let elem = region.weight(weight).ty.elem;
        Ok(Tensor::new(shape, data.iter().map(|v| elem.round(*v as f32)).collect()))
    }

    fn profile(
        &mut self,
        region: &Region,
        _: &[FusedDef],
        taps: &[ValueId],
        _: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        let values = self.run(region).values();
        Ok(taps.iter().map(|t| stats(&values[t])).collect())
    }

    fn evaluate(&self, region: &Region, _: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        let values = self.run(region).values();
        let tensor = |v: &ValueId| {
            let m = &values[v];
            Tensor::new(vec![1, m.rows(), m.cols], m.data.iter().map(|v| *v as f32).collect())
        };
        Ok(at.iter().map(tensor).collect())
    }
}

/// The statistics of the rows of a matrix.
pub fn stats(x: &Matrix) -> InputStats {
    let c = x.cols;
    let (mut mean, mut max, mut gram) = (vec![0.0f64; c], vec![0.0f64; c], vec![0.0f64; c * c]);
    for row in x.data.chunks(c) {
        for i in 0..c {
            mean[i] += row[i].abs() / x.rows() as f64;
            max[i] = max[i].max(row[i].abs());
            (0..c).for_each(|j| gram[i * c + j] += row[i] * row[j]);
        }
    }
    let f32s = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<f32>>();
    InputStats {
        tokens: x.rows() as u64,
        mean_abs: f32s(&mean),
        max_abs: f32s(&max),
        gram: f32s(&gram),
        sample: f32s(&x.data),
    }
}

/// What a test runs passes with.
pub struct Bench {
    pub exec: Naive,
    pub facts: Facts,
    pub remarks: Remarks,
    pub shared: BTreeSet<String>,
    pub scheme: Option<Scheme>,
    pub widths: Option<Vec<u8>>,
}

impl Bench {
    pub fn new(scheme: Option<&str>) -> Self {
        let scheme = scheme.map(|s| Scheme::Uniform(s.parse().unwrap()));
        Self {
            exec: Naive::new(40),
            facts: Facts::default(),
            remarks: Remarks::default(),
            shared: BTreeSet::new(),
            scheme,
            widths: None,
        }
    }

    /// Runs a pass with options in JSON.
    pub fn pass<P: Pass>(&mut self, region: &mut Region, options: &str) -> Changed {
        self.attempt::<P>(region, options).unwrap()
    }

    /// Runs a pass that may refuse.
    pub fn attempt<P: Pass>(&mut self, region: &mut Region, options: &str) -> Result<Changed, PassError> {
        let (mut fused, mut budget) = (Vec::new(), Budget::default());
        let mut cx = PassCx {
            exec: &mut self.exec,
            fused: &mut fused,
            facts: &mut self.facts,
            remarks: &mut self.remarks,
            scheme: self.scheme,
            widths: self.widths.as_deref(),
            shared: &self.shared,
            last: false,
            budget: &mut budget,
        };
        cx.remarks.enter(P::NAME, &region.name.to_string());
        let pass = P::new(serde_json::from_str(options).unwrap()).unwrap();
        pass.run(region, &mut cx)
    }

    /// The numbers under `key` in the records of a pass.
    pub fn numbers(&self, pass: &str, key: &str) -> Vec<f64> {
        self.remarks.records.iter().filter(|(p, _)| p == pass).filter_map(|(_, r)| r[key].as_f64()).collect()
    }
}
