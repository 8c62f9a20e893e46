//! Error compensation, compared with what the authors' program (IST-DASLab/gptq) computed on the same matrices in
//! float32 on a CPU (`data/gptq_cases.safetensors`: weight, Hessian, its factor, codes and grids of six cases).
#![allow(clippy::unwrap_used)] // also outside of test functions

use awqc_ir::{Group, Quant};
use awqc_passes::gptq::{Compensated, Factor, Grids, compensate, reference};
use awqc_passes::rtn;
use safetensors::SafeTensors;

const DATA: &[u8] = include_bytes!("data/gptq_cases.safetensors");

struct Case {
    name: &'static str,
    quant: Quant,
    act_order: bool,
    static_groups: bool,
}

const fn case(
    name: &'static str,
    bits: u8,
    group: Group,
    symmetric: bool,
    act_order: bool,
    static_groups: bool,
) -> Case {
    Case { name, quant: Quant { bits, symmetric, group }, act_order, static_groups }
}

/// Whole rows and groups, in order and by falling energy, with and without static groups; the last one has channels
/// that are always 0, and fewer tokens than channels.
const CASES: [Case; 6] = [
    case("case0", 4, Group::Row, false, false, false),
    case("case1", 4, Group::Row, false, true, false),
    case("case2", 4, Group::Size(32), false, false, false),
    case("case3", 4, Group::Size(32), true, true, false),
    case("case4", 3, Group::Size(64), false, true, true),
    case("case5", 4, Group::Size(64), true, false, false),
];

/// The block and the damping of the cases.
const BLOCK: usize = 128;
const DAMP: f64 = 0.01;

impl Case {
    fn bytes(&self, key: &str) -> (Vec<usize>, Vec<u8>) {
        let all = SafeTensors::deserialize(DATA).unwrap();
        let t = all.tensor(&format!("{}.{key}", self.name)).unwrap();
        (t.shape().to_vec(), t.data().to_vec())
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        self.bytes(key).1.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
    }

    fn longs(&self, key: &str) -> Vec<usize> {
        self.bytes(key).1.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c) as usize).collect()
    }

    fn cols(&self) -> usize {
        self.bytes("W").0[1]
    }

    /// Weight and Hessian, dead channels settled.
    fn problem(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut w, mut h) = (self.floats("W"), self.floats("H"));
        let dead: Vec<bool> = (0..self.cols()).map(|c| h[c * self.cols() + c] == 0.0).collect();
        assert_eq!(dead, self.bytes("dead").1.iter().map(|d| *d != 0).collect::<Vec<_>>());
        reference::settle_dead(&mut w, &mut h, self.cols());
        (w, h)
    }

    /// The factor that the program had.
    fn published(&self) -> Factor {
        let dead = vec![false; self.cols()];
        Factor { order: self.longs("perm"), upper: self.floats("Hinv_chol_upper"), damp: DAMP, dead }
    }

    fn compensate(&self, w: &[f32], factor: &Factor) -> Compensated {
        let cols = self.cols();
        let grids = w.chunks(cols).flat_map(|row| row.chunks(self.quant.group.len(cols))).map(|group| {
            let (lo, hi) = rtn::range(group);
            reference::grid(self.quant, lo, hi)
        });
        let (scales, zeros): (Vec<f32>, Vec<u8>) = grids.map(|g| (g.scale, g.zero as u8)).unzip();
        let grids = match self.static_groups {
            true => Grids::Given { scales: &scales, zeros: &zeros },
            false => Grids::Running(reference::grid),
        };
        compensate(w, cols, factor, grids, self.quant, BLOCK)
    }

    fn moved(&self, found: &Compensated) -> usize {
        let want = self.bytes("codes").1;
        assert_eq!(want.len(), found.codes.codes.len());
        want.iter().zip(&found.codes.codes).filter(|(a, b)| a != b).count()
    }
}

#[test]
fn the_published_factor_gives_the_published_codes() {
    for case in &CASES {
        let (w, _) = case.problem();
        let found = case.compensate(&w, &case.published());
        assert_eq!(case.moved(&found), 0, "{}", case.name);
        let group_of: Vec<usize> = found.group_of.iter().map(|g| *g as usize).collect();
        assert_eq!(group_of, case.longs("g_idx"), "{}", case.name);
        for (i, (got, want)) in found.codes.scales.iter().zip(case.floats("scales")).enumerate() {
            assert!((got - want).abs() <= 2e-4 * want, "{} scale {i}: {got}, want {want}", case.name);
        }
        let zeros: Vec<f32> = found.codes.zeros.iter().map(|z| f32::from(*z)).collect();
        assert_eq!(zeros, case.floats("zeros"), "{}", case.name);
    }
}

#[test]
fn the_factor_is_the_published_one_up_to_rounding() {
    for case in &CASES {
        let (w, h) = case.problem();
        let cols = case.cols();
        let factor = Factor::new(&h, cols, DAMP, case.act_order).unwrap();
        assert_eq!(factor.order, case.longs("perm"), "{}", case.name);
        assert_eq!(factor.damp, DAMP);
        let want = case.floats("Hinv_chol_upper");
        let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (got, want) in factor.upper.iter().zip(&want) {
            assert!((got - want).abs() <= 2e-2 * largest, "{}: {got}, want {want}", case.name);
        }
        // With fewer tokens than channels, the last bits of f32 decide some codes: 53 of 18432 move in double
        // precision.
        let moved = case.moved(&case.compensate(&w, &factor));
        assert!(moved <= if case.name == "case5" { 60 } else { 0 }, "{}: {moved} codes moved", case.name);
    }
}
