//! Weight expressions against arithmetic by hand.

use std::sync::Arc;

use awqc_exec::{MemorySource, Realized, layout, realize};
use awqc_ir::{DataId, Elem, Group, Layout, Module, Quant, Region, WeightId};
use awqc_passes::rtn;
use half::f16;

use crate::support::{Random, module};

/// A region whose weights are those of `lines`; every one is used by a node so that the text keeps it.
fn region(lines: &str) -> Region {
    let text = format!(
        "awqir 1\nmodel \"m\" {{dtype=f16}}\ndim B, S\nregion @r (%x: f16[B,S,4]) from \"p\" {{\n{lines}\n  return %x\n}}\n"
    );
    let m: Module = module(&text);
    m.regions.into_iter().next().unwrap()
}

fn weight(region: &Region, name: &str) -> WeightId {
    region.weight_ids().find(|w| region.weight(*w).name.as_deref() == Some(name)).unwrap()
}

fn source() -> MemorySource {
    let mut s = MemorySource::new();
    s.insert_f32("p.a", &[2, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    s.insert_f32("p.b", &[2, 4], &[-1.0, 0.0, 1.0, 0.5, 0.25, 8.0, -8.0, 2.0]);
    s.insert_f32("p.g", &[4], &[0.1, 0.2, 0.3, 0.4]);
    s
}

fn set(region: &mut Region, index: usize, values: &[f32]) {
    region.set_data_values(DataId::new(index), Some(Arc::from(values)));
}

fn floats(region: &Region, name: &str) -> Vec<f32> {
    match realize(region, weight(region, name), &source()) {
        Ok(Realized::Float { data, .. }) => data,
        other => panic!("{other:?}"),
    }
}

fn error(region: &Region, name: &str) -> String {
    realize(region, weight(region, name), &source()).unwrap_err().to_string()
}

#[test]
fn every_float_term() {
    let mut r = region(
        r#"  #s = data "s" : f32[4]
  #t = data "t" : f32[2]
  #u = data "u" : f32[1]
  $m = mul.1("a", #s) : f16[2,4]
  $d = div.0("a", #t) : f16[2,4]
  $i = mul.1("a", tie(#t, 1, 2)) : f16[2,4]
  $w = div.1("a", within(#u, 2, 4)) : f16[2,4]
  $o = offset("a", -1.5) : f16[2,4]
  $a = "a" : f16[2,4]
  $b = "b" : f16[2,4]
  $c = cat.0($a, $b) : f16[4,4]
  $e = cat.1($a, $b) : f16[2,8]
  $r = rows($c, 1, 2) : f16[2,4]
  $x = transpose("a") : f16[4,2]"#,
    );
    set(&mut r, 0, &[1.0, 10.0, 100.0, 0.5]);
    set(&mut r, 1, &[2.0, 4.0]);
    set(&mut r, 2, &[8.0]);
    assert_eq!(floats(&r, "m"), [1.0, 20.0, 300.0, 2.0, 5.0, 60.0, 700.0, 4.0]);
    assert_eq!(floats(&r, "d"), [0.5, 1.0, 1.5, 2.0, 1.25, 1.5, 1.75, 2.0]);
    // Runs of one entry, each serving two channels: factors 2, 2, 4, 4.
    assert_eq!(floats(&r, "i"), [2.0, 4.0, 12.0, 16.0, 10.0, 12.0, 28.0, 32.0]);
    assert_eq!(floats(&r, "w"), [1.0, 2.0, 0.375, 4.0, 5.0, 6.0, 0.875, 8.0]);
    assert_eq!(floats(&r, "o"), [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]);
    assert_eq!(floats(&r, "c"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -1.0, 0.0, 1.0, 0.5, 0.25, 8.0, -8.0, 2.0]);
    assert_eq!(floats(&r, "e"), [1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 1.0, 0.5, 5.0, 6.0, 7.0, 8.0, 0.25, 8.0, -8.0, 2.0]);
    assert_eq!(floats(&r, "r"), [5.0, 6.0, 7.0, 8.0, -1.0, 0.0, 1.0, 0.5]);
    assert_eq!(floats(&r, "x"), [1.0, 5.0, 2.0, 6.0, 3.0, 7.0, 4.0, 8.0]);
}

#[test]
fn clip_limits_each_group() {
    let mut r = region(
        r#"  #lo = data "lo" : f32[2,2]
  #hi = data "hi" : f32[2,2]
  $c = clip("b", #lo, #hi, g3) : f16[2,4]"#,
    );
    set(&mut r, 0, &[-0.5, 0.0, -2.0, 0.0]);
    set(&mut r, 1, &[0.5, 0.25, 4.0, 1.0]);
    assert_eq!(floats(&r, "c"), [-0.5, 0.0, 0.5, 0.25, 0.25, 4.0, -2.0, 1.0]);
}

#[test]
fn floats_are_rounded_once_and_not_below_quant() {
    let mut r = region(
        r#"  #s = data "s" : f32[4]
  $g = mul.0(div.0("g", #s), #s) : f16[4]
  $q = quant(mul.1("a", #s)) : u8row[2,4]"#,
    );
    let s = [0.1, 0.3, 0.7, 1.1];
    set(&mut r, 0, &s);
    let want: Vec<f32> =
        [0.1f32, 0.2, 0.3, 0.4].iter().zip(&s).map(|(g, s)| f16::from_f32(g / s * s).to_f32()).collect();
    assert_eq!(floats(&r, "g"), want);
    let exact: Vec<f32> = (1..=8).map(|i| i as f32 * s[(i - 1) % 4]).collect();
    let quant = Quant { bits: 8, symmetric: false, group: Group::Row };
    let want = rtn::quantize(&exact, 2, 4, quant);
    assert_eq!(realize(&r, weight(&r, "q"), &source()).unwrap(), Realized::Quant(want));
}

#[test]
fn quantized_terms_join_and_slice_by_rows() {
    let r = region(
        r#"  $a = quant("a") : u4g2[2,4]
  $b = quant("b") : u4g2[2,4]
  $c = cat.0($a, $b) : u4g2[4,4]
  $r = rows($c, 1, 2) : u4g2[2,4]
  $p = pack($c) : u4g2@rows[4,4]"#,
    );
    let codes = |name: &str| match realize(&r, weight(&r, name), &source()).unwrap() {
        Realized::Quant(c) => c,
        Realized::Float { .. } => panic!("{name} is quantized"),
    };
    let (a, b, c, rows) = (codes("a"), codes("b"), codes("c"), codes("r"));
    assert_eq!((c.rows, c.cols), (4, 4));
    assert_eq!(c.decode(), [a.decode(), b.decode()].concat());
    assert_eq!(rows.decode(), c.decode()[4..12]);
    assert_eq!(rows.zeros, [&a.zeros[2..], &b.zeros[..2]].concat());
    assert_eq!(codes("p"), c);
}

#[test]
fn chosen_codes_are_taken_as_they_are() {
    // What they stand for is not in the checkpoint.
    let lines = r#"  #q = data "codes of nowhere" : f32[2,4]
  #s = data "scales of nowhere" : f32[2,2]
  #z = data "zero points of nowhere" : f32[2,2]
  $q = codes("nowhere", #q, #s, #z) : u3g3[2,4]
  $a = quant("a") : u3g3[2,4]
  $c = cat.0($a, $q) : u3g3[4,4]
  $p = pack($q) : u3g3@rows[2,4]"#;
    let mut r = region(lines);
    let (q, s, z) = ([0.0, 7.0, 3.0, 2.0, 1.0, 0.0, 5.0, 4.0], [0.5, 2.0, 0.0, 0.25], [3.0, 1.0, 0.0, 7.0]);
    let fill = |r: &mut Region| {
        set(r, 0, &q);
        set(r, 1, &s);
        set(r, 2, &z);
    };
    fill(&mut r);
    let decoded = |r: &Region, name: &str| realize(r, weight(r, name), &source()).unwrap().into_tensor().data;
    let want = [-1.5, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0, -0.75];
    assert_eq!(decoded(&r, "q"), want);
    assert_eq!(decoded(&r, "p"), want);
    assert_eq!(decoded(&r, "c"), [decoded(&r, "a"), want.to_vec()].concat());
    let mut broken = |entry: usize, values: &[f32], message: &str| {
        fill(&mut r);
        set(&mut r, entry, values);
        let found = error(&r, "q");
        assert!(found.contains(message), "{found}");
    };
    broken(
        0,
        &[8.0; 8],
        "#q (codes of nowhere) holds 8 at 0, u3g3 has whole numbers of 0 to 7: compile the model again",
    );
    broken(0, &[0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "holds 0.5 at 1");
    broken(0, &[f32::NAN; 8], "holds NaN at 0");
    broken(1, &[1.0, 1.0, 1.0, -1.0], "#s (scales of nowhere) holds -1 at 3");
    broken(1, &[1.0, 1.0, 1.0, 0.1], "holds 0.1 at 3, a scale is an f16");
    broken(1, &[1.0, f32::INFINITY, 1.0, 1.0], "holds inf at 1");
    broken(2, &[1.0, 2.0, 3.0, -1.0], "#z (zero points of nowhere) holds -1 at 3");
    broken(2, &[1.0; 3], "#z has 3 numbers");
    // Symmetric codes have one zero point.
    let mut r = region(&lines.replace("u3g3", "i3g3"));
    fill(&mut r);
    assert!(error(&r, "q").contains("i3g3 has whole numbers of 4 to 4"), "{}", error(&r, "q"));
}

#[test]
fn packed_tensors_are_read_in_both_layouts() {
    let mut random = Random(5);
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(4) };
    let codes = rtn::quantize(&random.numbers(8 * 12), 8, 12, quant);
    let r = region(
        r#"  $a = packed.rows("w") : u4g4@rows[8,12]
  $b = packed.awq_gemm("w") : u4g4@awq_gemm[8,12]
  $c = packed.rows("missing") : u4g4@rows[8,12]"#,
    );
    for (name, layout) in [("a", Layout::Rows), ("b", Layout::AwqGemm)] {
        let mut source = MemorySource::new();
        for part in layout::pack(&codes, layout).unwrap() {
            source.insert(format!("p.w{}", part.suffix), part.tensor);
        }
        assert_eq!(realize(&r, weight(&r, name), &source).unwrap(), Realized::Quant(codes.clone()));
    }
    assert!(error(&r, "c").contains("p.missing.codes"));
}

#[test]
fn errors_name_the_tensor() {
    let mut r = region(
        r#"  #s = data "scales" : f32[4]
  $m = mul.1("a", #s) : f16[2,4]
  $n = "nowhere" : f16[2,4]
  $s = "a" : f16[4,2]
  $i = "inf" : f16[1]
  $o = offset("g", 70000.0) : f16[4]"#,
    );
    assert!(error(&r, "m").contains("#s (scales) has no numbers"), "{}", error(&r, "m"));
    assert!(error(&r, "n").contains("`p.nowhere`"));
    assert!(error(&r, "s").contains("`p.a`") && error(&r, "s").contains("[2, 4]"));
    assert!(error(&r, "o").contains("does not fit"), "{}", error(&r, "o"));
    set(&mut r, 0, &[1.0, f32::INFINITY, 1.0, 1.0]);
    assert!(error(&r, "m").contains("infinite"));
    let mut damaged = source();
    damaged.insert_f32("p.inf", &[1], &[f32::NAN]);
    let message = realize(&r, weight(&r, "i"), &damaged).unwrap_err().to_string();
    assert!(message.contains("`p.inf`") && message.contains("NaN"), "{message}");
    // The elements of a weight that overflow are not stored as infinity.
    assert_eq!(Elem::F16.round(70000.0), f32::INFINITY);
}
