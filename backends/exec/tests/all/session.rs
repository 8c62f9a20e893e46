//! Whole models: cached and uncached runs, streams, batches, and the executor's calibration.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use awqc_exec::host::math::log_sum_exp;
use awqc_exec::stream::prepare;
use awqc_exec::{Chunk, Control, Host, HostExecutor, Logits, Session, stream};
use awqc_ir::{Module, Region, ValueId, WeightExpr, verify};
use awqc_passes::manager::Manager;
use awqc_passes::profile::{Profile, taps};
use awqc_passes::quantize::Quantize;
use awqc_passes::{Afterwards, ExecError, Executor, Registry, Remarks};

use crate::support::{DECODER, diff, module, weights, windows};

fn session(module: &Module) -> Session<Host> {
    Session::new(verify(module).unwrap(), &weights(module), Default::default()).unwrap()
}

fn value(region: &Region, name: &str) -> ValueId {
    region.value_ids().find(|v| &*region.value(*v).name == name).unwrap()
}

#[test]
fn cached_equals_uncached() {
    let m = module(DECODER);
    let mut s = session(&m);
    let ids = &windows(&[20], 50)[0];
    let whole = s.forward(ids, Logits::All).unwrap();
    assert_eq!((whole.shape.as_slice(), s.position()), (&[1, 20, 50][..], 20));
    s.reset();
    let mut pieces = s.forward(&ids[..7], Logits::All).unwrap().data;
    for id in &ids[7..] {
        let last = s.forward(&[*id], Logits::Last).unwrap();
        assert_eq!(last.shape, [1, 1, 50]);
        pieces.extend(last.data);
    }
    assert!(diff(&pieces, &whole.data) < 1e-5);
    assert_eq!(s.position(), 20);
}

#[test]
fn last_is_the_last_row_of_all() {
    let m = module(DECODER);
    let mut s = session(&m);
    let rows = windows(&[9, 9, 9], 50);
    let rows: Vec<&[i32]> = rows.iter().map(Vec::as_slice).collect();
    let all = s.forward_batch(&rows, Logits::All).unwrap();
    s.reset();
    let last = s.forward_batch(&rows, Logits::Last).unwrap();
    assert_eq!(last.shape, [3, 1, 50]);
    for b in 0..3 {
        assert!(diff(&last.data[b * 50..][..50], &all.data[(b * 9 + 8) * 50..][..50]) < 1e-5);
    }
}

#[test]
fn sequences_of_a_batch_do_not_mix() {
    let m = module(DECODER);
    let mut s = session(&m);
    let rows = windows(&[9, 9], 50);
    let both = s.forward_batch(&[&rows[0], &rows[1]], Logits::All).unwrap();
    s.reset();
    let second = s.forward(&rows[1], Logits::All).unwrap();
    assert!(diff(&both.data[9 * 50..], &second.data) < 1e-5);
}

#[test]
fn bad_input_is_refused_and_resets() {
    let m = module(DECODER);
    let mut s = session(&m);
    s.forward(&[1, 2, 3], Logits::Last).unwrap();
    let error = s.forward(&[50], Logits::Last).unwrap_err().to_string();
    assert!(error.contains("50") && error.contains("outside"), "{error}");
    assert_eq!(s.position(), 0);
    assert!(s.forward(&[], Logits::Last).is_err());
    assert!(s.forward_batch(&[&[1, 2], &[3]], Logits::Last).is_err());
    s.forward(&[1], Logits::Last).unwrap();
    assert!(s.forward_batch(&[&[1], &[3]], Logits::Last).is_err());
}

#[test]
fn a_stream_gives_what_a_session_gives() {
    let m = module(DECODER);
    let (source, mut s) = (weights(&m), session(&m));
    let ids = windows(&[12, 3, 140], 50);
    let mut got: Vec<Vec<f32>> = vec![Vec::new(); 3];
    let mut order = Vec::new();
    let mut sink = |c: Chunk| {
        let at = c.piece;
        order.push((at.window, at.first));
        assert_eq!(got[at.window].len(), at.first * 50, "rows come in order");
        got[at.window].extend(c.logits.data);
        Ok(())
    };
    stream(verify(&m).unwrap(), &source, &ids, &Control::new(), &mut sink).unwrap();
    assert!(order.is_sorted());
    for (ids, got) in ids.iter().zip(&got) {
        s.reset();
        assert!(diff(got, &s.forward(ids, Logits::All).unwrap().data) < 1e-5);
    }
    let verified = verify(&m).unwrap();
    let ready = prepare(verified, &source, &ids, &Control::new()).unwrap();
    let pieces = ready.pieces();
    assert_eq!(pieces.iter().map(|p| p.len).collect::<Vec<_>>(), [12, 3, 128, 12]);
    let sums: Vec<f32> = pieces
        .iter()
        .flat_map(|p| ready.logits(p).unwrap().data.chunks(50).map(|r| log_sum_exp(r) as f32).collect::<Vec<_>>())
        .collect();
    let want = got.concat().chunks(50).map(|r| r.iter().map(|v| v.exp()).sum::<f32>().ln()).collect::<Vec<_>>();
    assert!(diff(&sums, &want) < 1e-5);
}

#[test]
fn an_interrupt_stops_a_stream() {
    let m = module(DECODER);
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    let control = Control::new().with_interrupt(flag).with_progress(move |p| {
        if p.region.to_string() == "@0" {
            raised.store(true, Ordering::Relaxed);
        }
    });
    let out = stream(verify(&m).unwrap(), &weights(&m), &windows(&[4], 50), &control, &mut |_| panic!("no logits"));
    assert!(matches!(out, Err(ExecError::Interrupted)));
}

#[test]
fn hidden_states_are_shown_between_regions() {
    let m = module(DECODER);
    let mut seen = Vec::new();
    session(&m)
        .trace(&[&[1, 2, 3]], Logits::All, &mut |region, t| {
            seen.push((region.name.to_string(), t.shape));
            Ok(())
        })
        .unwrap();
    let shape = vec![1, 3, 24];
    assert_eq!(seen, [("@embed".into(), shape.clone()), ("@0".into(), shape.clone()), ("@1".into(), shape)]);
}

/// Profiles every layer with its linears' inputs as taps.
fn profile(threads: usize) -> Vec<awqc_passes::InputStats> {
    let m = module(DECODER);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut exec =
            HostExecutor::new(Arc::new(weights(&m))).with_calibration(&windows(&[30, 7, 30, 30, 12], 50)).unwrap();
        let mut out = Vec::new();
        for region in &m.regions[..3] {
            let names: &[&str] = if region.name.is_layer() { &["x", "h1", "a", "h2", "h1"] } else { &[] };
            let taps: Vec<ValueId> = names.iter().map(|n| value(region, n)).collect();
            out.extend(exec.profile(region, &m.fused, &taps, Afterwards::Exit).unwrap());
        }
        out
    })
}

#[test]
fn profiling_does_not_depend_on_threads() {
    let one = profile(1);
    assert_eq!(one.len(), 10);
    assert_eq!(one, profile(2));
    assert_eq!(one, profile(3));
    assert_eq!(one[1], one[4], "one value, one set of statistics");
}

#[test]
fn statistics_are_those_of_the_activations() {
    let m = module(DECODER);
    let ids = windows(&[30, 7, 30, 30, 12], 50);
    let mut s = session(&m);
    // The input of layer 1, from the session.
    let mut rows: Vec<f32> = Vec::new();
    for ids in &ids {
        s.reset();
        let mut observe = |region: &Region, t: awqc_passes::Tensor| {
            if region.name.to_string() == "@0" {
                rows.extend(t.data);
            }
            Ok(())
        };
        s.trace(&[ids], Logits::All, &mut observe).unwrap();
    }
    let stats = &profile(2)[5];
    assert_eq!((stats.tokens, stats.channels()), (109, 24));
    let sum = |f: &dyn Fn(&[f32]) -> f32| rows.chunks(24).map(f).sum::<f32>();
    for c in [0, 11, 23] {
        assert!((stats.mean_abs[c] - sum(&|r| r[c].abs()) / 109.0).abs() < 1e-4);
        for d in [0, 5, 23] {
            let want = sum(&|r| r[c] * r[d]);
            assert!((stats.gram[c * 24 + d] - want).abs() < 1e-3 * (1.0 + want.abs()));
        }
    }
    assert!(!stats.sample.is_empty());
    assert!(rows.chunks(24).any(|r| diff(r, &stats.sample[..24]) < 1e-4), "samples are rows of the stream");
}

#[test]
fn evaluation_uses_the_kept_sample() {
    let m = module(DECODER);
    let ids = windows(&[6, 6, 6], 50);
    let mut exec = HostExecutor::new(Arc::new(weights(&m))).with_calibration(&ids).unwrap().with_sample_windows(2);
    exec.profile(&m.regions[0], &m.fused, &[], Afterwards::Exit).unwrap();
    exec.profile(&m.regions[1], &m.fused, &[], Afterwards::Exit).unwrap();
    let layer = &m.regions[1];
    let out = exec.evaluate(layer, &m.fused, &[value(layer, "r2"), value(layer, "x")]).unwrap();
    assert_eq!(out[0].shape, [12, 24]);
    let mut rows = Vec::new();
    let mut s = session(&m);
    for ids in &ids[..2] {
        s.reset();
        s.trace(&[ids], Logits::All, &mut |r, t| {
            if r.name == layer.name {
                rows.extend(t.data);
            }
            Ok(())
        })
        .unwrap();
    }
    assert!(diff(&out[0].data, &rows) < 1e-5);
    // Another region than the one that was profiled gets made-up inputs, the same ones each time.
    let head = &m.regions[3];
    let at = head.results().to_vec();
    let (a, b) = (exec.evaluate(head, &m.fused, &at).unwrap(), exec.evaluate(head, &m.fused, &at).unwrap());
    assert_eq!(a, b);
    let embed = &m.regions[0];
    assert!(exec.evaluate(embed, &m.fused, embed.results()).is_ok(), "made-up ids lie in the table");
}

#[test]
fn propagated_statistics_are_those_behind_compiled_layers() {
    let m = module(DECODER);
    let registry = Registry::empty().with::<Profile>().with::<Quantize>();
    let exec = || HostExecutor::new(Arc::new(weights(&m))).with_calibration(&windows(&[30, 12], 50)).unwrap();
    let run = |pipeline: &str, exec: &mut HostExecutor| {
        let mut m = m.clone();
        let mut manager = Manager::new(&registry, pipeline.parse().unwrap(), Default::default()).unwrap();
        let reports = manager.run_module(&mut m, exec, &mut Remarks::default(), &mut |_| ()).unwrap();
        (m, reports[2].facts.inputs.values().flatten().cloned().collect::<Vec<_>>())
    };
    let (_, propagated) = run("profile{propagate},quantize{bits=2,group=8}", &mut exec());
    let (quantized, _) = run("quantize{bits=2,group=8}", &mut exec());
    let mut by_hand = exec();
    for region in &quantized.regions[..2] {
        by_hand.profile(region, &m.fused, &[], Afterwards::Exit).unwrap();
    }
    let float = &m.regions[2];
    assert_eq!(propagated, by_hand.profile(float, &m.fused, &taps(float), Afterwards::Entry).unwrap());
    // The stream has stayed where it was.
    assert_eq!(propagated, by_hand.profile(float, &m.fused, &taps(float), Afterwards::Exit).unwrap());
    assert_ne!(propagated, run("profile,quantize{bits=2,group=8}", &mut exec()).1);
}

#[test]
fn values_that_are_not_finite_are_named() {
    let m = module(DECODER);
    let mut source = weights(&m);
    // Finite weights that overflow together: %q of layer 0 is the first value to become infinite.
    source.insert_f32("layers.0.q.weight", &[24, 24], &[60000.0; 576]);
    source.insert_f32("layers.0.ln1.weight", &[24], &[60000.0; 24]);
    let mut big = m.clone();
    let region = &mut big.regions[1];
    let q = region.weight_ids().find(|w| region.weight(*w).name.as_deref() == Some("q")).unwrap();
    let mut ty = region.weight(q).ty.clone();
    ty.elem = awqc_ir::Elem::F32;
    region.wrap_weight(q, ty, |of| WeightExpr::Offset { of, by: 3e38 });
    let mut exec = HostExecutor::new(Arc::new(source)).with_calibration(&windows(&[4], 50)).unwrap();
    exec.profile(&big.regions[0], &big.fused, &[], Afterwards::Exit).unwrap();
    let error = exec.profile(&big.regions[1], &big.fused, &[], Afterwards::Exit).unwrap_err();
    assert!(matches!(&error, ExecError::NotFinite(m) if m.contains("region @0") && m.contains("%q")), "{error}");
    assert!(
        matches!(exec.profile(&big.regions[1], &big.fused, &[], Afterwards::Exit), Err(ExecError::Unavailable(_))),
        "the stream is gone"
    );
}

#[test]
fn without_calibration_there_is_no_profile() {
    let m = module(DECODER);
    let mut exec = HostExecutor::new(Arc::new(weights(&m)));
    assert!(matches!(exec.profile(&m.regions[0], &m.fused, &[], Afterwards::Exit), Err(ExecError::Unavailable(_))));
    assert!(HostExecutor::new(Arc::new(weights(&m))).with_calibration(&[]).is_err());
    assert!(HostExecutor::new(Arc::new(weights(&m))).with_calibration(&[vec![]]).is_err());
}
