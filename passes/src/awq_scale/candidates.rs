//! Candidate scales of a site.

use std::fmt;

use awqc_ir::Group;

use super::Rule;
use super::statistics::SiteData;
use crate::analysis::gauge::Site;
use crate::awq::reference;

/// Where a candidate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// s = 1.
    One,
    /// `x^α`.
    Paper,
    /// `x^α / w^(1−α)`.
    Duo,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::One => "one",
            Origin::Paper => "paper",
            Origin::Duo => "duo",
        })
    }
}

/// Scales to try.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    /// The rule that made them.
    pub(super) rule: Origin,
    /// Its exponent.
    pub(super) alpha: f64,
    /// One for each free scale of the site.
    pub(super) scales: Vec<f32>,
}

impl Candidate {
    /// Whether it changes nothing.
    pub(super) fn is_one(&self) -> bool {
        self.scales.iter().all(|s| *s == 1.0)
    }
}

/// s = 1 and then `n` candidates by `rule`, exponents evenly spaced up to 1.
pub(super) fn grid(data: &SiteData, site: &Site, group: Group, rule: Rule, n: u32) -> Vec<Candidate> {
    let mut out = vec![Candidate { rule: Origin::One, alpha: 0.0, scales: vec![1.0; site.free] }];
    if data.x.iter().all(|x| *x <= 0.0) {
        return out;
    }
    let w = data.weight_mean(site, group);
    let mut add = |rule: Origin, from: u32, n: u32| {
        for k in from..=n {
            let alpha = f64::from(k) / f64::from(n.max(1));
            let scales = balanced(match rule {
                Origin::One => vec![1.0; site.free],
                Origin::Paper => data.x.iter().map(|x| f64::from(*x).powf(alpha)).collect(),
                Origin::Duo => {
                    let s = |(x, w): (&f32, &f32)| f64::from(*x).powf(alpha) / (f64::from(*w).powf(1.0 - alpha) + 1e-4);
                    data.x.iter().zip(&w).map(s).collect()
                }
            });
            out.push(Candidate { rule, alpha, scales });
        }
    };
    // α = 0 is s = 1 by the paper's rule; by the other one it is 1/w.
    match rule {
        Rule::Paper => add(Origin::Paper, 1, n),
        Rule::Duo => add(Origin::Duo, 0, n.saturating_sub(1)),
        Rule::Both => {
            add(Origin::Paper, 1, n - n / 2);
            if n >= 2 {
                add(Origin::Duo, 0, n / 2 - 1);
            }
        }
    }
    out
}

/// The published grid; the published search has s = 1 in it only by the paper's rule.
pub(super) fn published(data: &SiteData, site: &Site, group: Group, rule: Rule) -> Vec<Candidate> {
    let w = data.weight_mean(site, group);
    let rules: &[(Origin, reference::Rule<'_>)] = match rule {
        Rule::Paper => &[(Origin::Paper, reference::Rule::Activation)],
        Rule::Duo => &[(Origin::Duo, reference::Rule::Duo(&w))],
        Rule::Both => &[(Origin::Paper, reference::Rule::Activation), (Origin::Duo, reference::Rule::Duo(&w))],
    };
    let ratios = (0..reference::RATIOS).map(|i| i as f32 / reference::RATIOS as f32);
    ratios
        .flat_map(|r| rules.iter().map(move |(origin, rule)| (r, *origin, *rule)))
        .map(|(r, origin, rule)| Candidate {
            rule: origin,
            alpha: f64::from(r),
            scales: reference::scales(&data.x, rule, r),
        })
        .collect()
}

/// Divided by the root of largest times smallest, so that scales lie around 1. Channels that (nearly) nothing flows
/// through would stretch the range for all others: no scale is more than 10⁴ below the largest.
fn balanced(mut s: Vec<f64>) -> Vec<f32> {
    let largest = s.iter().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
    if largest <= 0.0 {
        return vec![1.0; s.len()];
    }
    s.iter_mut().for_each(|v| *v = if v.is_finite() { v.max(largest * 1e-4) } else { largest });
    let smallest = s.iter().copied().fold(largest, f64::min);
    let middle = (largest * smallest).sqrt();
    s.iter().map(|v| (v / middle) as f32).map(|v| if v.is_finite() && v > 0.0 { v } else { 1.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::balanced;

    #[test]
    fn scales_are_positive_finite_and_balanced() {
        let s = balanced(vec![0.0, 4.0, f64::INFINITY, 1.0]);
        assert!(s.iter().all(|v| *v > 0.0 && v.is_finite()), "{s:?}");
        let (lo, hi) = crate::rtn::range(&s);
        assert!((lo * hi - 1.0).abs() < 1e-5 && hi / lo <= 1.001e4, "{s:?}");
        assert_eq!(balanced(vec![0.0, 0.0]), [1.0, 1.0]);
    }
}
