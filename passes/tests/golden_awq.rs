//! The published search, compared with what AutoAWQ 0.2.9 computed on the same matrices (`data/awq_cases.safetensors`,
//! made by `xtask golden` from that program's own functions in float32 on a CPU).
#![allow(clippy::unwrap_used)] // also outside of test functions

use awqc_ir::{Group, Quant};
use awqc_passes::awq::reference::{self, Rule};
use safetensors::SafeTensors;

const DATA: &[u8] = include_bytes!("data/awq_cases.safetensors");

struct Case {
    name: &'static str,
    /// Linears that are searched together.
    linears: usize,
    group: u32,
    bits: u8,
    duo: Duo,
}

#[derive(PartialEq)]
enum Duo {
    On,
    Off,
}

/// One linear of three, two and four bits, queries, keys and values together, and gate and up before a fixed down.
const CASES: [Case; 5] = [
    Case { name: "case2", linears: 1, group: 32, bits: 3, duo: Duo::On },
    Case { name: "case3", linears: 1, group: 64, bits: 2, duo: Duo::On },
    Case { name: "case4", linears: 1, group: 32, bits: 4, duo: Duo::Off },
    Case { name: "case5", linears: 3, group: 64, bits: 4, duo: Duo::On },
    Case { name: "case6", linears: 2, group: 32, bits: 4, duo: Duo::On },
];

impl Case {
    fn quant(&self, symmetric: bool) -> Quant {
        Quant { bits: self.bits, symmetric, group: Group::Size(self.group) }
    }

    fn bytes(&self, key: &str) -> (Vec<usize>, Vec<u8>) {
        let all = SafeTensors::deserialize(DATA).unwrap();
        let t = all.tensor(&format!("{}.{key}", self.name)).unwrap();
        (t.shape().to_vec(), t.data().to_vec())
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        self.bytes(key).1.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
    }

    fn doubles(&self, key: &str) -> Vec<f64> {
        self.bytes(key).1.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect()
    }

    fn longs(&self, key: &str) -> Vec<i64> {
        self.bytes(key).1.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect()
    }

    fn codes(&self, key: &str) -> Vec<i32> {
        self.bytes(key).1.iter().map(|c| i32::from(*c as i8)).collect()
    }

    fn cols(&self) -> usize {
        self.bytes("X").0[1]
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        (0..self.linears).map(|l| self.floats(&format!("l{l}.W"))).collect()
    }

    /// What the outputs are compared by: all linears' outputs, or the whole feed-forward.
    fn output(&self, x: &[f32], weights: &[Vec<f32>]) -> Vec<f64> {
        let cols = self.cols();
        let linear = |x: &[f64], w: &[f32]| -> Vec<f64> {
            w.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
        };
        let down = (self.name == "case6").then(|| self.floats("down.W"));
        let token = |x: &[f32]| -> Vec<f64> {
            let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            match &down {
                None => weights.iter().flat_map(|w| linear(&x, w)).collect(),
                Some(down) => {
                    let (gate, up) = (linear(&x, &weights[0]), linear(&x, &weights[1]));
                    let h: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                    linear(&h, down)
                }
            }
        };
        x.chunks(cols).flat_map(token).collect()
    }
}

fn close(what: &str, got: &[f32], want: &[f32], relative: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= relative * w.abs(), "{what}[{i}]: {g}, want {w}");
    }
}

#[test]
fn statistics_and_scales() {
    for case in &CASES {
        let weights = case.weights();
        let slices: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let w_mean = reference::weight_mean(&slices, case.cols(), Group::Size(case.group));
        close("x_mean", &reference::activation_mean(&case.floats("X"), case.cols()), &case.floats("x_mean"), 1e-6);
        close("w_mean", &w_mean, &case.floats("w_mean"), 1e-6);
        let x_mean = case.floats("x_mean");
        let w_mean = case.floats("w_mean");
        let rule = if case.duo == Duo::On { Rule::Duo(&w_mean) } else { Rule::Activation };
        for (i, want) in case.floats("ratio_scales").chunks(case.cols()).enumerate() {
            let got = reference::scales(&x_mean, rule, i as f32 / 20.0);
            close(&format!("{} ratio {i}", case.name), &got, want, 2e-6);
        }
    }
}

#[test]
fn the_search_finds_the_same_exponent_by_the_same_losses() {
    for case in &CASES {
        let (x, weights, quant) = (case.floats("X"), case.weights(), case.quant(false));
        let want = case.output(&x, &weights);
        let (x_mean, w_mean) = (case.floats("x_mean"), case.floats("w_mean"));
        let rule = if case.duo == Duo::On { Rule::Duo(&w_mean) } else { Rule::Activation };
        let found = reference::search(&x_mean, rule, |s| {
            let rounded: Vec<_> = weights.iter().map(|w| reference::fake_quantize(w, s, quant)).collect();
            let got = case.output(&x, &rounded);
            let sum: f64 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
            Ok::<f64, ()>(sum / want.len() as f64)
        });
        let found = found.unwrap().unwrap();
        for (i, (got, want)) in found.losses.iter().zip(case.doubles("losses")).enumerate() {
            assert!((got / want - 1.0).abs() < 1e-4, "{} ratio {i}: {got}, want {want}", case.name);
        }
        assert_eq!(found.best as i64, case.longs("best_ratio_index")[0], "{}", case.name);
        close("best_scales", &found.scales, &case.floats("best_scales"), 2e-6);
    }
}

#[test]
fn rounding_is_the_same_code_for_code() {
    for case in &CASES {
        for (l, w) in case.weights().iter().enumerate() {
            let zp = reference::pseudo_quantize(w, case.cols(), case.quant(false));
            assert_eq!(zp.codes, case.codes(&format!("l{l}.zp.codes")), "{} {l}", case.name);
            assert_eq!(zp.scales, case.floats(&format!("l{l}.zp.scales")));
            assert_eq!(zp.zeros, case.floats(&format!("l{l}.zp.zeros")));
            let sym = reference::pseudo_quantize(w, case.cols(), case.quant(true));
            assert_eq!(sym.codes, case.codes(&format!("l{l}.sym.codes")), "{} {l}", case.name);
            assert_eq!(sym.scales, case.floats(&format!("l{l}.sym.scales")));
        }
    }
}

#[test]
fn clip_bounds_are_the_same() {
    for case in &CASES {
        let (x, cols, quant) = (case.floats("X"), case.cols(), case.quant(false));
        for (l, w) in case.weights().iter().enumerate() {
            let found = reference::clip_search(w, &x, cols, quant, 512);
            let index: Vec<i64> = found.index.iter().map(|i| i64::from(*i)).collect();
            assert_eq!(index, case.longs(&format!("l{l}.clip.index")), "{} {l}", case.name);
            close("clip", &found.max, &case.floats(&format!("l{l}.clip.max_val")), 1e-6);
        }
    }
}

#[test]
fn the_whole_of_it_gives_the_same_codes() {
    for case in &CASES {
        let (cols, quant, s) = (case.cols(), case.quant(false), case.floats("best_scales"));
        let x: Vec<f32> = case.floats("X").chunks(cols).flat_map(|x| x.iter().zip(&s).map(|(x, s)| x / s)).collect();
        for (l, w) in case.weights().iter().enumerate() {
            let scaled: Vec<f32> = w.chunks(cols).flat_map(|w| w.iter().zip(&s).map(|(w, s)| w * s)).collect();
            let found = reference::clip_search(&scaled, &x, cols, quant, 512);
            let index: Vec<i64> = found.index.iter().map(|i| i64::from(*i)).collect();
            assert_eq!(index, case.longs(&format!("l{l}.full.index")), "{} {l}", case.name);
            let max = case.floats(&format!("l{l}.full.max_val"));
            let group = case.group as usize;
            let clipped: Vec<f32> =
                scaled.iter().enumerate().map(|(i, v)| v.clamp(-max[i / group], max[i / group])).collect();
            let rounded = reference::pseudo_quantize(&clipped, cols, quant);
            assert_eq!(rounded.codes, case.codes(&format!("l{l}.full.codes_f32")), "{} {l}", case.name);
            assert_eq!(rounded.zeros, case.floats(&format!("l{l}.full.zeros_f32")), "{} {l}", case.name);
        }
    }
}
