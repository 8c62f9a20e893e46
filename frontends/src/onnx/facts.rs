//! What computed numbers *are*: positions, a mask, the cosines and sines of rotary embedding. They are read off the
//! numbers, whatever ops an exporter made them with.

use awqc_ir::op::{RopeScaling, RopeTable};

use super::import::Known;
use super::numbers::Numbers;
use super::view::SAMPLES;

/// `offset`, if the numbers are `offset, offset + 1, …` along the last axis and the same along all others.
pub(super) fn positions(known: &Known) -> Option<u32> {
    let first = *known[0].data.first()?;
    let counts = known.iter().zip(SAMPLES).all(|(n, (_, s))| {
        n.whole && n.shape.last() == Some(&s) && n.data.iter().enumerate().all(|(i, v)| *v == first + (i % s) as f64)
    });
    (counts && (0.0..65536.0).contains(&first)).then_some(first as u32)
}

/// What attention may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mask {
    /// All positions.
    All,
    /// Those up to its own.
    Causal,
    /// Of these the last so many.
    Window(usize),
}

/// The mask whose numbers say, by `visible`, which key each query sees; they may lack leading axes of scores.
pub(super) fn mask(known: &Known, visible: impl Fn(f64) -> Option<bool>) -> Option<Mask> {
    let read = |n: &Numbers, s: usize| {
        let n = if n.shape.len() < 2 { n.expanded(&[s, s]).ok()? } else { n.clone() };
        let mut shape = n.shape.clone();
        let rank = shape.len();
        shape[rank - 2..].copy_from_slice(&[s, s]);
        let n = n.expanded(&shape).ok()?;
        let seen: Vec<bool> = n.data.iter().map(|v| visible(*v)).collect::<Option<_>>()?;
        let first = seen.get(..s * s)?.to_vec();
        seen.chunks(s * s).all(|c| c == first).then_some(first)
    };
    let [(a, s), (b, t)] = [0, 1].map(|i| (read(&known[i], SAMPLES[i].1), SAMPLES[i].1));
    let (a, b) = (a?, b?);
    let is = |f: &dyn Fn(usize, usize) -> bool| {
        [(&a, s), (&b, t)].into_iter().all(|(m, s)| m.iter().enumerate().all(|(i, v)| *v == f(i / s, i % s)))
    };
    if is(&|_, _| true) {
        return Some(Mask::All);
    }
    if is(&|q, k| k <= q) {
        return Some(Mask::Causal);
    }
    // The last query of the longer sample sees as many keys as the window is wide.
    let width = b.get((t - 1) * t..)?.iter().filter(|v| **v).count();
    is(&|q, k| k <= q && q - k < width).then_some(Mask::Window(width))
}

/// A number that is added to scores: 0 where a key is seen, far below all scores where it is not.
pub(super) fn added(v: f64) -> Option<bool> {
    match v {
        0.0 => Some(true),
        v if v <= -1e4 => Some(false),
        _other => None,
    }
}

/// Angles of rotary embedding: how far each pair turns from one position to the next, and a factor on cosines and
/// sines.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Angles {
    pub(super) turns: Vec<f64>,
    pub(super) factor: f64,
    /// Whether the columns are there twice, one half after the other.
    pub(super) halves: bool,
}

/// A table `[…, S, columns]`, and whether it is one of cosines.
pub(super) struct Trig {
    rows: [Vec<f64>; 2],
    columns: usize,
    cosines: bool,
}

/// Numbers that may be cosines or sines of angles that grow with the position.
pub(super) fn trig(known: &Known) -> Option<Trig> {
    let columns = *known[0].shape.last()?;
    let read = |n: &Numbers, s: usize| {
        let [.., rows, c] = n.shape[..] else { return None };
        if rows != s || c != columns || n.whole || c == 0 {
            return None;
        }
        let first = n.data.get(..s * c)?;
        n.data.chunks(s * c).all(|chunk| chunk == first).then(|| first.to_vec())
    };
    let (a, b) = (read(&known[0], SAMPLES[0].1)?, read(&known[1], SAMPLES[1].1)?);
    // The same positions have the same angles, whatever the length.
    if a.iter().zip(&b).any(|(x, y)| x != y) {
        return None;
    }
    let first = b.get(..columns)?;
    let cosines = first.iter().all(|v| *v == first[0]) && first[0] > 0.0;
    (cosines || first.iter().all(|v| *v == 0.0)).then_some(Trig { rows: [a, b], columns, cosines })
}

/// The angles whose cosines and sines two tables are, in either order; and whether `this` is the cosines.
pub(super) fn angles(this: &Trig, other: &Trig) -> Option<(Angles, bool)> {
    if this.cosines == other.cosines || this.columns != other.columns {
        return None;
    }
    let (cos, sin) = if this.cosines { (this, other) } else { (other, this) };
    let (cos, sin, n) = (&cos.rows[1], &sin.rows[1], this.columns);
    let factor = *cos.first()?;
    let turns: Vec<f64> = (0..n).map(|j| Some(sin.get(n + j)?.atan2(*cos.get(n + j)?))).collect::<Option<_>>()?;
    let right = |(i, (c, s)): (usize, (&f64, &f64))| {
        let angle = turns[i % n] * (i / n) as f64;
        (c - factor * angle.cos()).abs() < 1e-6 && (s - factor * angle.sin()).abs() < 1e-6
    };
    if !cos.iter().zip(sin).enumerate().all(right) {
        return None;
    }
    let halves = n.is_multiple_of(2) && turns[..n / 2] == turns[n / 2..];
    let turns = if halves { turns[..n / 2].to_vec() } else { turns };
    Some((Angles { turns, factor, halves }, this.cosines))
}

impl Angles {
    /// The op that makes these cosines and sines.
    pub(super) fn table(&self) -> RopeTable {
        let pairs = self.turns.len();
        let dim = 2 * pairs as u64;
        let close =
            |f: &dyn Fn(usize) -> f64| self.turns.iter().enumerate().all(|(j, t)| (t / f(j) - 1.0).abs() < 4e-6);
        let power = |theta: f64, j: usize| theta.powf(-(j as f64) / pairs as f64);
        let first = self.turns.first().copied().unwrap_or(1.0);
        if let (Some(last), true) = (self.turns.last(), pairs > 1 && self.factor == 1.0) {
            // Few digits, as people write it.
            let base = (last / first).powf(-(pairs as f64) / (pairs - 1) as f64);
            for digits in [2, 3, 4, 5, 6] {
                let theta: f64 = format!("{base:.digits$e}").parse().unwrap_or(base);
                let factor: f64 = format!("{:.5e}", 1.0 / first).parse().unwrap_or(1.0);
                if close(&|j| power(theta, j) / factor) {
                    let scaling = (factor != 1.0).then_some(RopeScaling::Linear { factor });
                    return RopeTable { dim, theta, scaling };
                }
            }
        }
        let theta = 10_000.0;
        let divisors: Vec<f64> = self.turns.iter().enumerate().map(|(j, t)| power(theta, j) / t).collect();
        let original = f64::from(u32::MAX);
        let scaling = RopeScaling::Long { short: divisors.clone(), long: divisors, original, attention: self.factor };
        RopeTable { dim, theta, scaling: Some(scaling) }
    }
}
