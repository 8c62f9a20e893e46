//! Saved statistics: they come back as they were, damaged ones are refused, and a compile from them runs no model.

#![allow(clippy::unwrap_used)] // also outside of test functions

mod support;

use std::collections::BTreeMap;

use awqc_ir::{FusedDef, Region, ValueId, WeightId};
use awqc_passes::profile::store::{Recording, Replaying, StatsStore, from_tensors, to_tensors};
use awqc_passes::profile::taps;
use awqc_passes::{Afterwards, ExecError, Executor, InputStats, Tensor};
use support::{Naive, layer};

const BODY: &str = r#"layer @0 (%x: f32[B,S,6]) from "m" {
  $n = "n" : f32[6]
  $a = "a" : f32[5,6]
  $b = "b" : f32[6,5]
  %h = rms_norm %x, $n {eps=1e-5} : f32[B,S,6]
  %u = linear %h, $a : f32[B,S,5]
  %r = relu %u : f32[B,S,5]
  %y = linear %r, $b : f32[B,S,6]
  return %y
}"#;

#[derive(Default)]
struct Kept(BTreeMap<String, BTreeMap<String, Tensor>>);

impl StatsStore for Kept {
    fn load(&self, region: &str) -> Result<Option<Vec<InputStats>>, ExecError> {
        self.0.get(region).map(|t| from_tensors(|name| t.get(name).cloned())).transpose()
    }

    fn save(&mut self, region: &str, stats: &[InputStats]) -> Result<(), ExecError> {
        self.0.insert(region.to_owned(), to_tensors(stats).into_iter().collect());
        Ok(())
    }
}

/// Realizes weights, and refuses to run anything.
struct Still(Naive);

impl Executor for Still {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        self.0.realize(region, weight)
    }

    fn profile(
        &mut self,
        _: &Region,
        _: &[FusedDef],
        _: &[ValueId],
        _: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        panic!("a compile from saved statistics must not run the model")
    }

    fn evaluate(&self, _: &Region, _: &[FusedDef], _: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        panic!("a compile from saved statistics must not run the model")
    }
}

fn recorded() -> (Region, Vec<InputStats>, Kept) {
    let (region, mut store) = (layer(BODY), Kept::default());
    let taps = taps(&region);
    assert_eq!(taps.len(), 2);
    let mut naive = Naive::new(30);
    let stats =
        Recording { inner: &mut naive, store: &mut store }.profile(&region, &[], &taps, Afterwards::Exit).unwrap();
    (region, stats, store)
}

#[test]
fn what_is_saved_comes_back() {
    let (region, stats, store) = recorded();
    let mut still = Still(Naive::new(30));
    let mut replay = Replaying { inner: &mut still, store: &store };
    assert_eq!(replay.profile(&region, &[], &taps(&region), Afterwards::Exit).unwrap(), stats);
    // Regions without taps need nothing.
    assert_eq!(replay.profile(&region, &[], &[], Afterwards::Exit).unwrap(), []);
}

#[test]
fn many_tokens_are_counted_exactly() {
    let stats = vec![InputStats { tokens: (1 << 40) + 12_345, ..InputStats::default() }];
    let tensors: BTreeMap<String, Tensor> = to_tensors(&stats).into_iter().collect();
    assert_eq!(from_tensors(|n| tensors.get(n).cloned()).unwrap(), stats);
}

#[test]
fn statistics_of_another_model_are_refused() {
    let (region, _, mut store) = recorded();
    let mut still = Still(Naive::new(30));
    let other = layer(&BODY.replace("[5,6]", "[7,6]").replace("[6,5]", "[6,7]").replace("B,S,5", "B,S,7"));
    let error = Replaying { inner: &mut still, store: &store }
        .profile(&other, &[], &taps(&other), Afterwards::Exit)
        .unwrap_err();
    assert!(error.to_string().contains("%r is f32[B,S,7]") && error.to_string().contains("5 channels"), "{error}");
    store.0.clear();
    let error = Replaying { inner: &mut still, store: &store }
        .profile(&region, &[], &taps(&region), Afterwards::Exit)
        .unwrap_err();
    assert!(error.to_string().contains("region @0"), "{error}");
}

#[test]
fn damage_is_named() {
    let (_, stats, _) = recorded();
    let tensors: BTreeMap<String, Tensor> = to_tensors(&stats).into_iter().collect();
    for name in tensors.keys() {
        let mut damaged = tensors.clone();
        if let Some(t) = damaged.get_mut(name) {
            t.data.push(0.0);
            t.shape = vec![t.data.len()];
        }
        let result = from_tensors(|n| damaged.get(n).cloned());
        assert!(result.is_err_and(|e| e.to_string().contains("damaged")), "{name} of another length");
        damaged.remove(name);
        let result = from_tensors(|n| damaged.get(n).cloned());
        let cut_short = name.ends_with("tokens");
        assert_eq!(result.is_err(), !cut_short, "{name} missing");
    }
}
