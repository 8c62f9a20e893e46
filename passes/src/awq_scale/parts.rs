//! Parts of a site that can be decided one by one: linears that share no scale, such as the experts of a layer, need
//! not agree on an exponent.

use std::fmt;

use super::candidates::{Candidate, Origin};
use super::statistics::SiteData;
use crate::analysis::gauge::Site;
use crate::facts::FEW_TOKENS;

/// Consumers that share scales with each other and with no other consumer.
pub(super) struct Part {
    /// Their places in the site's data.
    pub(super) consumers: Vec<usize>,
    /// Whether each of the site's scales belongs to it.
    slots: Vec<bool>,
    /// Whether it is one of several, and saw too few tokens to judge.
    pub(super) rare: bool,
}

impl Part {
    /// All of a site.
    pub(super) fn whole(data: &SiteData<'_>, site: &Site) -> Self {
        Self { consumers: (0..data.consumers.len()).collect(), slots: vec![true; site.free], rare: false }
    }
}

/// The parts of a site, in order of their first consumer.
pub(super) fn of(data: &SiteData<'_>, site: &Site) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for (i, consumer) in data.consumers.iter().enumerate() {
        let mut new = Part { consumers: vec![i], slots: vec![false; site.free], rare: false };
        for slot in data.entry(site, consumer).iter().flatten() {
            if let Some(mine) = new.slots.get_mut(*slot as usize) {
                *mine = true;
            }
        }
        let (meet, apart): (Vec<Part>, Vec<Part>) =
            parts.into_iter().partition(|p| p.slots.iter().zip(&new.slots).any(|(a, b)| *a && *b));
        parts = apart;
        for part in meet {
            new.consumers.extend(part.consumers);
            new.slots.iter_mut().zip(part.slots).for_each(|(a, b)| *a |= b);
        }
        new.consumers.sort_unstable();
        parts.push(new);
    }
    parts.sort_by_key(|p| p.consumers.first().copied());
    if parts.len() < 2 {
        return vec![Part::whole(data, site)];
    }
    for part in &mut parts {
        let tokens: u64 = part.consumers.iter().filter_map(|i| data.consumers.get(*i)).map(|c| data.tokens(c)).sum();
        part.rare = tokens < FEW_TOKENS;
    }
    parts
}

/// What was chosen for a site.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    /// The rule that made most of the scales.
    pub(super) rule: Origin,
    /// The exponent of each part.
    pub(super) alphas: Vec<f64>,
    /// One for each free scale.
    pub(super) scales: Vec<f32>,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.alphas.as_slice() {
            [alpha] => write!(f, "{} α={alpha}", self.rule),
            alphas => {
                let low = alphas.iter().copied().fold(f64::INFINITY, f64::min);
                let high = alphas.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                write!(f, "{} α={low}..{high} in {} parts", self.rule, alphas.len())
            }
        }
    }
}

/// The scales of the candidates that `chosen` names, part by part; 1 where no part has a say.
pub(super) fn compose(candidates: &[Candidate], parts: &[Part], chosen: &[usize]) -> Choice {
    let mut choice = Choice { rule: Origin::One, alphas: Vec::new(), scales: Vec::new() };
    for (part, candidate) in parts.iter().zip(chosen.iter().filter_map(|i| candidates.get(*i))) {
        choice.scales.resize(part.slots.len(), 1.0);
        choice.alphas.push(candidate.alpha);
        if choice.rule == Origin::One {
            choice.rule = candidate.rule;
        }
        for ((scale, new), mine) in choice.scales.iter_mut().zip(&candidate.scales).zip(&part.slots) {
            if *mine {
                *scale = *new;
            }
        }
    }
    choice
}
