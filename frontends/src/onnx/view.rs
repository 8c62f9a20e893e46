//! How an ONNX value lies in a value of the IR. Exporters spell heads out: they reshape `[B,S,H·D]` to `[B,S,H,D]`,
//! turn that to `[B,H,S,D]`, and repeat what heads share. None of this computes anything. A [`View`] says for each axis
//! of the ONNX value what it counts of the IR's `[B,S,C]`; reshapes, transpositions and expansions change the view
//! alone.
//!
//! Sizes are known for two sizes of input at once ([`SAMPLES`]), so that what grows with the input is told apart from
//! what does not without any algebra.

use super::numbers::broadcast;

/// Batch and sequence lengths that a model is read with.
pub(super) const SAMPLES: [(usize, usize); 2] = [(2, 24), (3, 37)];

/// A size for each of [`SAMPLES`].
pub(super) type Size = [usize; 2];

/// What an axis, or a part of one, counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// Sequences.
    Batch,
    /// Positions.
    Seq,
    /// Positions that are looked at: the last axis of attention scores.
    Keys,
    /// Channels this far apart.
    Channel(usize),
    /// Nothing: the same over and over.
    Repeat,
}

/// A part of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Factor {
    pub(super) size: Size,
    pub(super) from: From,
}

/// An axis: its parts, outermost first. None for an axis of length 1.
pub(super) type Axis = Vec<Factor>;

/// See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View(pub(super) Vec<Axis>);

pub(super) const BATCH: Factor = Factor { size: [SAMPLES[0].0, SAMPLES[1].0], from: From::Batch };
pub(super) const SEQ: Factor = Factor { size: [SAMPLES[0].1, SAMPLES[1].1], from: From::Seq };
pub(super) const KEYS: Factor = Factor { from: From::Keys, ..SEQ };

/// `n` channels that are `stride` apart.
pub(super) fn channels(n: usize, stride: usize) -> Factor {
    Factor { size: [n; 2], from: From::Channel(stride) }
}

/// Without parts of length 1, and with channels that follow each other as one part.
fn normal(axis: Axis) -> Axis {
    let mut out: Axis = Vec::new();
    for f in axis.into_iter().filter(|f| f.size != [1; 2]) {
        if let Some(last) = out.last_mut() {
            let joined = match (last.from, f.from) {
                (From::Channel(a), From::Channel(b)) if a == b * f.size[0] => Some(f.from),
                (From::Repeat, From::Repeat) => Some(From::Repeat),
                _apart => None,
            };
            if let Some(from) = joined {
                *last = Factor { size: [last.size[0] * f.size[0], last.size[1] * f.size[1]], from };
                continue;
            }
        }
        out.push(f);
    }
    out
}

/// How a smaller value goes with a larger one, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// Channel by channel.
    Same,
    /// One channel of the smaller one for a run of channels.
    Runs,
    /// The channels of the smaller one for each run of as many channels.
    Each,
}

impl View {
    /// `[B,S,C]`.
    pub(super) fn rows(c: usize) -> Self {
        Self(vec![vec![BATCH], vec![SEQ], normal(vec![channels(c, 1)])])
    }

    /// The shape for one of [`SAMPLES`].
    pub(super) fn shape(&self, sample: usize) -> Vec<usize> {
        self.0.iter().map(|axis| axis.iter().map(|f| f.size[sample]).product()).collect()
    }

    /// The same numbers in another shape, if the axes part that way.
    pub(super) fn reshaped(&self, target: [&[usize]; 2]) -> Option<Self> {
        let mut parts: Vec<Factor> = self.0.iter().flatten().rev().copied().collect();
        let mut axes = Vec::new();
        if target[0].len() != target[1].len() {
            return None;
        }
        for want in target[0].iter().zip(target[1]).map(|(a, b)| [*a, *b]) {
            let (mut axis, mut have) = (Vec::new(), [1usize; 2]);
            while have != want {
                let f = parts.pop()?;
                let left = [want[0].checked_div(have[0])?, want[1].checked_div(have[1])?];
                if (0..2).all(|i| f.size[i] > 0 && left[i].is_multiple_of(f.size[i])) {
                    axis.push(f);
                } else if left[0] == left[1]
                    && left[0] > 1
                    && f.size[0] == f.size[1]
                    && f.size[0].is_multiple_of(left[0])
                {
                    let rest = f.size[0] / left[0];
                    let from = match f.from {
                        From::Channel(stride) => From::Channel(stride * rest),
                        other @ (From::Batch | From::Seq | From::Keys | From::Repeat) => other,
                    };
                    parts.push(Factor { size: [rest; 2], from: f.from });
                    axis.push(Factor { size: left, from });
                } else {
                    return None;
                }
                let last = axis.last()?;
                have = [have[0] * last.size[0], have[1] * last.size[1]];
            }
            axes.push(normal(axis));
        }
        parts.is_empty().then_some(Self(axes))
    }

    /// The axes in another order.
    pub(super) fn transposed(&self, perm: &[usize]) -> Option<Self> {
        (perm.len() == self.0.len()).then_some(())?;
        perm.iter().map(|p| self.0.get(*p).cloned()).collect::<Option<_>>().map(Self)
    }

    /// Axes of length 1 repeated, as in broadcasting to the target shapes.
    pub(super) fn expanded(&self, target: [&[usize]; 2]) -> Option<Self> {
        let full: Vec<Vec<usize>> =
            (0..2).map(|i| broadcast(&self.shape(i), target[i])).collect::<Result<_, _>>().ok()?;
        // What is repeated costs nothing here, but its size must be a number.
        full.iter().map(|s| s.iter().try_fold(1usize, |n, d| n.checked_mul(*d))).collect::<Option<Vec<_>>>()?;
        let skip = full[0].len() - self.0.len();
        let axes = (0..full[0].len()).map(|i| {
            let size = [full[0][i], *full[1].get(i)?];
            let own = i.checked_sub(skip).and_then(|i| self.0.get(i)).cloned().unwrap_or_default();
            Some(if own.is_empty() { normal(vec![Factor { size, from: From::Repeat }]) } else { own })
        });
        axes.collect::<Option<_>>().map(Self)
    }

    /// The axis's channels, if it counts a single run of them and nothing else.
    pub(super) fn run(&self, axis: usize) -> Option<(usize, usize)> {
        match self.0.get(axis)?.as_slice() {
            [Factor { size, from: From::Channel(stride) }] => Some((size[0], *stride)),
            _ => None,
        }
    }

    /// How `small`, of `c_small` channels, goes with this view of `c` channels.
    pub(super) fn fits(&self, c: usize, small: &Self, c_small: usize) -> Option<Fit> {
        let skip = self.0.len().checked_sub(small.0.len())?;
        let pairs: Vec<(&Axis, Axis)> = self
            .0
            .iter()
            .enumerate()
            .map(|(i, axis)| (axis, i.checked_sub(skip).and_then(|i| small.0.get(i)).cloned().unwrap_or_default()))
            .collect();
        let run = c.checked_div(c_small)?;
        let channel = |f: &Factor| matches!(f.from, From::Channel(_));
        let fits = |fit: Fit| {
            pairs.iter().all(|(large, small)| {
                if large.as_slice() == small.as_slice() && !large.iter().any(channel) {
                    return true;
                }
                let small: Axis = small.iter().filter(|f| f.from != From::Repeat).copied().collect();
                let stride = |f: &Factor| match f.from {
                    From::Channel(s) => Some(s),
                    From::Batch | From::Seq | From::Keys | From::Repeat => None,
                };
                if small.is_empty() {
                    return match fit {
                        Fit::Same => large.iter().all(|f| stride(f).is_none()),
                        Fit::Runs => large.iter().filter_map(stride).all(|s| s < run),
                        Fit::Each => large.iter().filter_map(stride).all(|s| s >= c_small),
                    };
                }
                large.len() == small.len()
                    && large.iter().zip(&small).all(|(l, s)| {
                        let as_large = match (fit, s.from) {
                            (Fit::Runs, From::Channel(s)) => From::Channel(s * run),
                            (_, from) => from,
                        };
                        l.size == s.size && l.from == as_large
                    })
            })
        };
        [Fit::Same, Fit::Runs, Fit::Each].into_iter().find(|fit| (*fit == Fit::Same) == (c == c_small) && fits(*fit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(view: &View, h: usize, d: usize) -> View {
        let shapes = SAMPLES.map(|(b, s)| vec![b, s, h, d]);
        view.reshaped([&shapes[0], &shapes[1]]).unwrap()
    }

    #[test]
    fn heads_come_and_go() {
        let rows = View::rows(12);
        let turned = heads(&rows, 3, 4).transposed(&[0, 2, 1, 3]).unwrap();
        assert_eq!(turned.shape(1), [3, 3, 37, 4]);
        assert_eq!(turned.run(3), Some((4, 1)));
        assert_eq!(turned.run(1), Some((3, 4)));
        let back = turned.transposed(&[0, 2, 1, 3]).unwrap();
        let shapes = SAMPLES.map(|(b, s)| vec![b, s, 12]);
        assert_eq!(back.reshaped([&shapes[0], &shapes[1]]), Some(rows));
        // Without turning back the channels are not in order.
        let wrong = turned.reshaped([&shapes[0], &shapes[1]]);
        assert_ne!(wrong, Some(View::rows(12)));
    }

    #[test]
    fn smaller_values_fit_by_run_or_by_head() {
        let x = heads(&View::rows(12), 3, 4).transposed(&[0, 2, 1, 3]).unwrap();
        let table = View(vec![vec![], vec![], vec![SEQ], vec![channels(4, 1)]]);
        assert_eq!(x.fits(12, &table, 4), Some(Fit::Each));
        let mean = View(vec![vec![BATCH], vec![channels(3, 1)], vec![SEQ], vec![]]);
        assert_eq!(x.fits(12, &mean, 3), Some(Fit::Runs));
        assert_eq!(x.fits(12, &x, 12), Some(Fit::Same));
        let one = View(vec![vec![BATCH], vec![SEQ], vec![]]);
        assert_eq!(View::rows(12).fits(12, &one, 1), Some(Fit::Runs));
        assert_eq!(x.fits(12, &one, 1), None);
    }
}
