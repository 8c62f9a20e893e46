//! Linears of several widths: every search and `quantize` go by the width of the linear at hand, and by nothing else.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod support;

use awqc_ir::{Group, Region};
use awqc_passes::Scheme;
use awqc_passes::allocate::costs;
use awqc_passes::analysis::linears::{quantizable, units};
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::awq_scale::AwqScale;
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;

use support::{Bench, layer};

const LAYER: &str = r#"layer @0 (%x: f32[B,S,24]) from "" {
  $n1 = "n1"   : f32[24]
  $a  = "a"    : f32[16,24]
  $b  = "b"    : f32[16,24]
  $c  = "c"    : f32[24,16]
  $n2 = "n2"   : f32[24]
  $d  = "d"    : f32[20,24]
  $e  = "e"    : f32[24,20]
  %h  = rms_norm %x, $n1 {eps=1e-5}
  %a  = linear %h, $a
  %b  = linear %h, $b
  %s  = silu %a
  %m  = mul %s, %b
  %c  = linear %m, $c
  %r  = add %x, %c
  %g  = rms_norm %r, $n2 {eps=1e-5}
  %d  = linear %g, $d
  %t  = relu %d
  %e  = linear %t, $e
  %y  = add %r, %e
  return %y
}"#;

const MIXED: Scheme = Scheme::Mixed { symmetric: false, group: Group::Size(8) };

/// Profiles, clips and quantizes with these widths; the types, the errors, and the losses of the clip search.
fn mixed(widths: &[u8]) -> (Vec<String>, Vec<f64>, Vec<f64>) {
    let (mut bench, mut region) = (Bench::new(None), layer(LAYER));
    (bench.scheme, bench.widths) = (Some(MIXED), Some(widths.to_vec()));
    bench.pass::<Profile>(&mut region, "{}");
    bench.pass::<AwqClip>(&mut region, "{}");
    bench.pass::<Quantize>(&mut region, r#"{"bits":3.25,"group":8}"#);
    let types = region.used_weights().into_iter().filter_map(|w| region.weight(w).ty.elem.quant());
    let types = types.map(|q| q.to_string()).collect();
    (types, bench.numbers("quantize", "relative_error"), bench.numbers("awq-clip", "loss_after"))
}

#[test]
fn every_linear_goes_by_its_own_width() {
    let (types, errors, losses) = mixed(&[2, 4, 3, 8]);
    assert_eq!(types, ["u2g8", "u2g8", "u4g8", "u3g8", "u8g8"]);
    for (i, bits) in [2, 2, 4, 3, 8].into_iter().enumerate() {
        // As if all had this one's width: without scales, no linear touches another.
        let (_, alone, of_clip) = mixed(&[bits; 4]);
        assert_eq!((errors[i], losses[i]), (alone[i], of_clip[i]), "linear {i}");
    }
}

#[test]
fn scales_are_searched_for_the_width_of_each_linear() {
    let scales = |scheme: Option<Scheme>, widths: Option<&[u8]>, loss: &str| {
        let (mut bench, mut region) = (Bench::new(None), layer(LAYER));
        (bench.scheme, bench.widths) = (scheme, widths.map(<[u8]>::to_vec));
        bench.pass::<Profile>(&mut region, "{}");
        bench.pass::<AwqScale>(&mut region, &format!(r#"{{"loss":"{loss}"}}"#));
        bench.numbers("awq-scale", "loss_after")
    };
    for loss in ["linear", "block"] {
        let uniform = |text: &str| scales(Some(Scheme::Uniform(text.parse().unwrap())), None, loss);
        let (two, four) = (uniform("u2g8"), uniform("u4g8"));
        assert_eq!(scales(Some(MIXED), Some(&[4, 4, 4, 4]), loss), four);
        let some = scales(Some(MIXED), Some(&[4, 4, 4, 2]), loss);
        assert_eq!((some.len(), four.len()), (two.len(), two.len()));
        // Only the site in front of the last linear is searched for two bits.
        let differs: Vec<usize> = (0..some.len()).filter(|i| some[*i] != four[*i]).collect();
        assert_eq!(differs.len(), 1, "{loss}: {some:?} {four:?}");
        assert_eq!(some[differs[0]], two[differs[0]], "{loss}");
    }
}

#[test]
fn without_a_table_that_fits_nothing_is_rounded() {
    let refused = |widths: Option<&[u8]>| {
        let (mut bench, mut region) = (Bench::new(None), layer(LAYER));
        (bench.scheme, bench.widths) = (Some(MIXED), widths.map(<[u8]>::to_vec));
        let profiled = bench.attempt::<Profile>(&mut region, "{}");
        let done = profiled.and_then(|_| bench.attempt::<Quantize>(&mut region, r#"{"bits":3,"mixed":true}"#));
        done.unwrap_err().to_string()
    };
    assert!(refused(None).contains("no width was allocated for `a`"), "{}", refused(None));
    assert!(refused(Some(&[3, 3, 3])).contains("3 widths were allocated"), "{}", refused(Some(&[3, 3, 3])));
    assert!(refused(Some(&[3, 3, 3, 3, 3])).contains("has 4 groups of them"));
}

#[test]
fn units_are_the_linears_that_read_one_value_or_use_one_weight() {
    let of = |region: &Region| {
        let places = quantizable(region);
        let place = |l| places.iter().position(|p| *p == l).unwrap();
        units(region).into_iter().map(|u| u.into_iter().map(place).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    assert_eq!(of(&layer(LAYER)), [vec![0, 1], vec![2], vec![3], vec![4]]);
    // The fourth linear uses the first one's weight.
    assert_eq!(
        of(&layer(
            &LAYER
                .replace("$d  = \"d\"    : f32[20,24]\n", "")
                .replace("f32[24,20]", "f32[24,16]")
                .replace(", $d", ", $a")
        )),
        [vec![0, 1, 3], vec![2], vec![4]]
    );
}

#[test]
fn a_cost_is_the_error_of_the_output_weighed_by_channels() {
    let (mut bench, mut region) = (Bench::new(Some("u4g8")), layer(LAYER));
    bench.pass::<Profile>(&mut region, "{}");
    let linears = quantizable(&region);
    let taps: Vec<_> = bench.facts.inputs.iter().map(|(v, s)| (*v, s[0].clone())).collect();
    let minds = |by: f64| {
        let of = |l: &awqc_passes::analysis::linears::LinearUse| region.value(l.output).ty.channels().unwrap() as usize;
        linears.iter().map(|l| (*l, vec![by; of(l)])).collect::<Vec<_>>()
    };
    let found = |by: f64| costs(&region, &bench.exec, &taps, &minds(by), false, Group::Size(8)).unwrap();
    let (one, three) = (found(1.0), found(3.0));
    assert_eq!(one.iter().map(|u| u.elements).collect::<Vec<_>>(), [2 * 16 * 24, 24 * 16, 20 * 24, 24 * 20]);
    // With channels that count alike, it is the error that `quantize` reports, times the energy of the output.
    let mut rounded = region.clone();
    bench.pass::<Quantize>(&mut rounded, r#"{"bits":4,"group":8}"#);
    let errors = bench.numbers("quantize", "relative_error");
    let energy = |i: usize| {
        let values = bench.exec.run(&region).values();
        values[&linears[i].output].data.iter().map(|v| v * v).sum::<f64>()
    };
    let tokens = taps[0].1.tokens as f64;
    for (unit, of) in [&[0, 1][..], &[2], &[3], &[4]].iter().enumerate() {
        let want: f64 = of.iter().map(|i| errors[*i] * energy(*i)).sum::<f64>() / (2.0 * tokens);
        assert!((one[unit].cost / want - 1.0).abs() < 1e-3, "unit {unit}: {} {want}", one[unit].cost);
        assert!((three[unit].cost / one[unit].cost - 3.0).abs() < 1e-9);
    }
    // What was measured of something else is refused.
    let error = costs(&region, &bench.exec, &taps, &minds(1.0)[..2], false, Group::Size(8)).unwrap_err();
    assert!(error.to_string().contains("`c`"), "{error}");
}
