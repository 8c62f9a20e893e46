//! One module that breaks each invariant, and nothing else.

use std::sync::Arc;

use super::*;
use crate::id::{DataId, NodeId, ValueId, WeightId};
use crate::op::{Fused, Operand, Scale, Silu};
use crate::region::{Data, RegionName};
use crate::text::parse;
use crate::ty::{Dim, Elem, Layout, Type};
use crate::weight::{DataMap, DataRef, WeightExpr};

const TEXT: &str = r#"awqir 1
model "m" {dtype=f16}
dim B, S
fused @act (%x: f16[B,S,6], $g: f16[6]) {
  %h = rms_norm %x, $g {eps=1e-5}
  %y = silu %h
  return %y
}
fused @outer (%x: f16[B,S,6], $g: f16[6]) {
  %y = fused @act(%x, $g)
  return %y
}
region @embed (%ids: i32[B,S]) {
  $e = "embed" : f16[10,4]
  %x = embedding %ids, $e
  return %x
}
layer @0..1 (%x: f16[B,S,4]) from "l.{i}" {
  #s = data "scales" : f32[4]
  $g = "n" : f16[6]
  $w = quant(mul.1("w", #s)) : u4g2[6,4]
  $d = "d" : f16[4,6]
  %a = linear %x, $w
  %b = fused @outer(%a, $g)
  %c = linear %b, $d
  %y = add %x, %c
  return %y
}
region @head (%x: f16[B,S,4]) {
  $e = "embed" : f16[10,4]
  %l = linear %x, $e
  return %l
}
"#;

fn module() -> Module {
    parse(TEXT).map_err(|e| e.to_string()).unwrap()
}

/// The codes that a change to the module gives; the module without it is in order.
fn codes(change: impl FnOnce(&mut Module)) -> Vec<&'static str> {
    let mut m = module();
    verify(&m).map_err(|e| e.to_string()).unwrap();
    change(&mut m);
    verify(&m).err().map(|d| d.codes()).unwrap_or_default()
}

/// The node of layer 0 with this mnemonic.
fn node(m: &Module, mnemonic: &str) -> NodeId {
    m.regions[1].nodes().find(|(_, n)| n.op.mnemonic() == mnemonic).unwrap().0
}

/// The weight of layer 0 of this name.
fn weight(m: &Module, name: &str) -> WeightId {
    let r = &m.regions[1];
    r.weight_ids().find(|w| r.weight(*w).name.as_deref() == Some(name)).unwrap()
}

#[test]
fn v01_region_names() {
    assert_eq!(codes(|m| m.regions[3].name = RegionName::Named("embed".into())), ["V01"]);
    assert_eq!(codes(|m| m.regions[3].name = RegionName::Named("a b".into())), ["V01"]);
    assert_eq!(codes(|m| m.regions[2].name = RegionName::Layer(2)), ["V01"]);
    assert_eq!(codes(|m| m.regions[1].name = RegionName::Layer(7)), ["V01", "V01"]);
}

#[test]
fn v02_ids() {
    let far = 999;
    assert_eq!(
        codes(|m| {
            let n = node(m, "add");
            m.regions[1].set_operand(n, 0, Operand::Value(ValueId::new(far)));
        }),
        ["V02"]
    );
    assert_eq!(
        codes(|m| {
            let (w, ty) = (weight(m, "d"), Type::new(Elem::F16, [4.into(), 6.into()]));
            m.regions[1].set_weight(w, WeightExpr::Transpose(WeightId::new(far)), ty);
        }),
        ["V02"]
    );
    let cycle = codes(|m| {
        let (w, ty) = (weight(m, "d"), Type::new(Elem::F16, [4.into(), 6.into()]));
        let inner = m.regions[1].add_weight(None, WeightExpr::Transpose(w), ty.clone());
        m.regions[1].set_weight(w, WeightExpr::Transpose(inner), ty);
    });
    assert_eq!(cycle, ["V02"]);
    let deep = codes(|m| {
        let (w, ty) = (weight(m, "d"), Type::new(Elem::F16, [4.into(), 6.into()]));
        for _ in 0..100_000 {
            m.regions[1].wrap_weight(w, ty.clone(), |of| WeightExpr::Offset { of, by: 1.0 });
        }
    });
    assert_eq!(deep, ["V02"]);
    assert_eq!(codes(|m| m.regions[1].set_results(vec![ValueId::new(far)])), ["V02"]);
    assert_eq!(
        codes(|m| {
            let w = weight(m, "w");
            let by = DataRef { id: DataId::new(far), map: DataMap::Whole };
            m.regions[1].wrap_weight(w, Type::new(Elem::F16, []), |of| WeightExpr::Mul { axis: 0, of, by });
        }),
        ["V02"]
    );
}

#[test]
fn v03_stream() {
    let wide = |m: &mut Module| {
        let text = "awqir 1 region @x (%a: f16[B,S,5]) { %b = silu %a return %b }";
        m.regions[3] = parse(text).unwrap().regions.remove(0);
    };
    assert_eq!(codes(wide), ["V03"]);
    let many = |m: &mut Module| {
        let text = "awqir 1 region @x (%a: f16[B,S,4], %p: i32[S], %c: i32[S]) { %b = silu %a return %b }";
        m.regions[3] = parse(text).unwrap().regions.remove(0);
    };
    assert_eq!(codes(many), ["V03"]);
}

#[test]
fn v03_pixels_begin_the_stream() {
    let text = r#"awqir 1
    dim B, S, N
    region @eye (%p: f16[N,3,8,8]) { %x = patches %p {size=4} return %x }
    region @embed (%x: f16[N,4,48], %ids: i32[B,S], %pos: i32[S]) { return %ids, %pos }"#;
    let m = parse(text).map_err(|e| e.to_string()).unwrap();
    verify(&m).map_err(|e| e.to_string()).unwrap();
    let wrong = parse(&text.replace("%x: f16[N,4,48]", "%x: f16[N,3,48]")).map_err(|e| e.to_string()).unwrap();
    assert_eq!(verify(&wrong).unwrap_err().codes(), ["V03"]);
    let swapped = text.replace("%ids: i32[B,S], %pos: i32[S]", "%pos: i32[S], %ids: i32[B,S]");
    let swapped = parse(&swapped).map_err(|e| e.to_string()).unwrap();
    assert_eq!(verify(&swapped).unwrap_err().codes(), ["V03", "V03"]);
}

#[test]
fn ops_on_images_say_what_does_not_fit() {
    for (node, wrong) in [
        ("patches %p {size=9}", "holds no patch"),
        ("patches %p {size=0}", "holds no patch"),
        ("patches %x {size=2}", "takes pixels"),
        ("merge %x {side=3, by=2}", "merge takes"),
        ("merge %x {side=2, by=0}", "not possible"),
        ("cut %x {start=3, len=2}", "has no 2 rows"),
        ("append %x, %t", "constant number of rows"),
        ("append %x, %z", "only the number of rows"),
        ("place %t, %ids, %z {token=1}", "as many channels"),
        ("place %t, %pos, %x {token=1}", "its tokens"),
        ("count %pos {token=1}", "count takes"),
        ("cross_sdpa %t, %x, %x, %pos {heads=2, kv_heads=2}", "cross_sdpa takes"),
        ("cross_sdpa %t, %x, %z, %ids {heads=2, kv_heads=2}", "number of rows"),
        ("sdpa %x, %y, %y {causal, heads=2, kv_heads=2}", "like q"),
        ("gate %t, $w", "[1]"),
        ("learned %t, $v", "[R,C] or [C]"),
    ] {
        let text = format!(
            "awqir 1 dim B, S, N region @r (%p: f16[N,3,8,8], %x: f16[N,4,48], %y: f16[N,5,48], %z: f16[N,5,6], \
             %t: f16[B,S,48], %ids: i32[B,S], %pos: i32[S]) {{ $w = \"w\" : f16[48] $v = \"v\" : f16[1,2,3] %o = {node} return %o }}"
        );
        let e = parse(&text).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(wrong), "{node}: {e}");
    }
}

#[test]
fn a_piece_of_a_model_is_in_order() {
    for i in 1..4 {
        let mut m = module();
        m.regions = vec![m.regions.remove(i)];
        verify(&m).map_err(|e| e.to_string()).unwrap();
    }
}

#[test]
fn v04_use_before_definition() {
    let removed = codes(|m| {
        let n = node(m, "fused");
        m.regions[1].remove(n);
    });
    assert_eq!(removed, ["V04"]);
    let late = codes(|m| {
        let (first, last) = (node(m, "linear"), node(m, "add"));
        let value = m.regions[1].node(last).results[0];
        m.regions[1].set_operand(first, 0, Operand::Value(value));
    });
    assert_eq!(late, ["V04"]);
}

#[test]
fn v05_slots() {
    let swapped = codes(|m| {
        let (n, w) = (node(m, "add"), weight(m, "d"));
        m.regions[1].set_operand(n, 1, Operand::Weight(w));
    });
    assert_eq!(swapped, ["V05"]);
}

#[test]
fn v06_types() {
    let other = codes(|m| {
        let (n, w) = (node(m, "linear"), weight(m, "d"));
        m.regions[1].set_operand(n, 1, Operand::Weight(w));
    });
    assert_eq!(other, ["V06"]);
    let changed = codes(|m| {
        // A weight that changes its shape under the nodes that use it.
        let w = weight(m, "d");
        m.regions[1].set_weight(w, WeightExpr::Source("d".into()), Type::new(Elem::F16, [5.into(), 6.into()]));
    });
    assert_eq!(changed, ["V06"]);
}

#[test]
fn v07_results() {
    let removed = codes(|m| {
        let n = node(m, "add");
        m.regions[1].remove(n);
    });
    assert_eq!(removed, ["V07"]);
    assert_eq!(codes(|m| m.regions[3].set_results(Vec::new())), ["V07"]);
}

#[test]
fn v08_attributes() {
    let nan = codes(|m| {
        let r = &mut m.regions[3];
        let x = r.results()[0];
        let n = r.append(Scale { by: f64::NAN }.into(), vec![Operand::Value(x)], &[], &[]).unwrap();
        let y = r.node(n).results.clone();
        r.set_results(y);
    });
    assert_eq!(nan, ["V08"]);
}

#[test]
fn v09_weight_shapes() {
    let short = codes(|m| {
        let w = weight(m, "d");
        let of =
            m.regions[1].add_weight(None, WeightExpr::Source("d".into()), Type::new(Elem::F16, [3.into(), 6.into()]));
        let rows = WeightExpr::Rows { of, start: 1, len: 3 };
        m.regions[1].set_weight(w, rows, Type::new(Elem::F16, [4.into(), 6.into()]));
    });
    assert_eq!(short, ["V09"]);
    let differs = codes(|m| {
        let w = weight(m, "d");
        let of =
            m.regions[1].add_weight(None, WeightExpr::Source("d".into()), Type::new(Elem::F16, [4.into(), 6.into()]));
        m.regions[1].set_weight(w, WeightExpr::Transpose(of), Type::new(Elem::F16, [4.into(), 6.into()]));
    });
    assert_eq!(differs, ["V09"]);
    let few = codes(|m| {
        let w = weight(m, "d");
        chosen(m, w, [5, 3]);
    });
    assert_eq!(few, ["V09"]);
}

/// Gives a matrix of 4 rows and 6 columns codes with this many columns of codes and of scales.
fn chosen(m: &mut Module, w: WeightId, cols: [u64; 2]) {
    let r = &mut m.regions[1];
    let mut entry = |cols| r.add_data(Data { name: "a".into(), label: "".into(), shape: vec![4, cols], values: None });
    let [codes, scales, zeros] = [cols[0], cols[1], cols[1]].map(&mut entry);
    let ty = Type::new(Elem::Quant("u4g2".parse().unwrap()), [4.into(), 6.into()]);
    r.wrap_weight(w, ty, |of| WeightExpr::Codes { of, codes, scales, zeros });
}

#[test]
fn v10_weight_elements() {
    let quant = "u4g2".parse().unwrap();
    let matrix = || Type::new(Elem::Quant(quant), [6.into(), 4.into()]);
    let source = codes(|m| {
        let w = weight(m, "w");
        m.regions[1].set_weight(w, WeightExpr::Source("w".into()), matrix());
    });
    assert_eq!(source, ["V10"]);
    let unpacked = codes(|m| {
        let w = weight(m, "w");
        m.regions[1].wrap_weight(w, matrix(), WeightExpr::Pack);
    });
    assert_eq!(unpacked, ["V10"]);
    let narrow = codes(|m| {
        // Six rows do not fill words of eight columns.
        let w = weight(m, "w");
        let ty = Type { layout: Some(Layout::AwqGemm), ..matrix() };
        m.regions[1].wrap_weight(w, ty, WeightExpr::Pack);
    });
    assert_eq!(narrow, ["V10"]);
    let ungrouped = codes(|m| {
        // Groups of two in rows of six need three scales.
        let w = weight(m, "d");
        chosen(m, w, [6, 2]);
    });
    assert_eq!(ungrouped, ["V10"]);
    let infinite = codes(|m| {
        let w = weight(m, "d");
        let ty = Type::new(Elem::F16, [4.into(), 6.into()]);
        m.regions[1].wrap_weight(w, ty, |of| WeightExpr::Offset { of, by: f64::INFINITY });
    });
    assert_eq!(infinite, ["V10"]);
}

#[test]
fn v11_data() {
    let id = DataId::new(0);
    assert_eq!(codes(|m| m.regions[1].set_data_values(id, Some(Arc::from([1.0; 3])))), ["V11"]);
    assert_eq!(codes(|m| m.regions[1].set_data_values(id, Some(Arc::from([1.0, f32::NAN, 1.0, 1.0])))), ["V11"]);
    assert_eq!(codes(|m| m.regions[1].set_data_values(id, Some(Arc::from([1.0; 4])))), [""; 0]);
    let huge = codes(|m| {
        let r = &mut m.regions[1];
        let data = Data { name: "big".into(), label: "".into(), shape: vec![1 << 40, 1 << 40], values: None };
        let by = DataRef { id: r.add_data(data), map: DataMap::Whole };
        let w = r.weight_ids().find(|w| r.weight(*w).name.as_deref() == Some("d")).unwrap();
        r.wrap_weight(w, Type::new(Elem::F16, [4.into(), 6.into()]), |of| WeightExpr::Mul { axis: 0, of, by });
    });
    assert_eq!(huge, ["V11"]);
}

#[test]
fn v12_dimensions() {
    assert_eq!(codes(|m| m.dims = vec!["B".into(), "S".into(), "B".into()]), ["V12"]);
    let symbol = codes(|m| {
        let r = &mut m.regions[1];
        let p = r.add_param("p", Type::new(Elem::F16, [Dim::Sym("Q".into())]));
        let n = r.append(Silu {}.into(), vec![Operand::Value(p)], &[], &[]).unwrap();
        let _ = n;
    });
    // The parameter, the result, and the stream that has no such value.
    assert_eq!(symbol, ["V12", "V12", "V03"]);
    let quantized = "awqir 1 region @x (%x: u4g2[S,4]) { return %x }";
    assert_eq!(verify(&parse(quantized).unwrap()).unwrap_err().codes(), ["V12"]);
    let laid_out = "awqir 1 region @x (%x: f16@rows[S,4]) { return %x }";
    assert_eq!(verify(&parse(laid_out).unwrap()).unwrap_err().codes(), ["V12"]);
    let empty = "awqir 1 region @x (%x: f16[S,0]) { return %x }";
    assert_eq!(verify(&parse(empty).unwrap()).unwrap_err().codes(), ["V12"]);
}

#[test]
fn v13_fused_names() {
    let swapped = codes(|m| m.fused.swap(0, 1));
    assert_eq!(swapped, ["V13", "V06"]);
    let own = codes(|m| {
        let body = &mut m.fused[0].body;
        let params = body.params().to_vec();
        let n = body.order()[1];
        // Built against a module in which @act is known.
        let known = module().fused;
        body.insert_before(n, Fused { callee: "act".into() }.into(), params, &["r"], &known).unwrap();
    });
    assert_eq!(own, ["V13", "V06"]);
    let twice = codes(|m| {
        let def = m.fused[1].clone();
        m.fused.push(def);
    });
    assert_eq!(twice, ["V13"]);
}

#[test]
fn v14_parameters() {
    let source = codes(|m| {
        let body = &mut m.fused[0].body;
        let n = body.order()[0];
        let w = body.add_weight(Some("x".into()), WeightExpr::Source("x".into()), Type::new(Elem::F16, [6.into()]));
        body.set_operand(n, 1, Operand::Weight(w));
    });
    assert_eq!(source, ["V14"]);
    let outside = codes(|m| {
        let w = weight(m, "d");
        m.regions[1].set_weight(w, WeightExpr::Param(0), Type::new(Elem::F16, [4.into(), 6.into()]));
    });
    assert_eq!(outside, ["V14"]);
}

#[test]
fn v15_foreign_ops() {
    let text = "awqir 1 region @x (%x: f16[S,4]) { %y = foreign %x {op=Pow, by=2.0} return %y }";
    let module = parse(text).unwrap();
    assert_eq!(parse(&crate::text::print(&module)).unwrap().regions.len(), 1);
    let errors = verify(&module).unwrap_err();
    assert_eq!(errors.codes(), ["V15"]);
    assert!(errors.to_string().contains("Pow"), "{errors}");
}

#[test]
fn stages() {
    let m = module();
    assert_eq!(verify_stage(&m, Stage::Float).unwrap_err().codes(), ["V20", "V20"]);
    verify_stage(&m, Stage::Quantized).unwrap();
    assert_eq!(verify_stage(&m, Stage::Packed).unwrap_err().codes(), ["V22", "V22"]);
    let mut m = module();
    let w = weight(&m, "w");
    let by = DataRef { id: DataId::new(0), map: DataMap::Whole };
    let ty = m.regions[1].weight(w).ty.clone();
    m.regions[1].wrap_weight(w, ty, |of| WeightExpr::Mul { axis: 1, of, by });
    assert_eq!(verify_stage(&m, Stage::Quantized).unwrap_err().codes(), ["V21"]);
}

#[test]
fn errors_stand_in_the_region_under_their_line() {
    let mut m = module();
    let n = node(&m, "add");
    m.regions[1].remove(n);
    let shown = verify(&m).unwrap_err().to_string();
    let lines: Vec<&str> = shown.lines().collect();
    let at = lines.iter().position(|l| l.trim_start().starts_with("return")).unwrap();
    assert_eq!(lines[at + 1].trim_start().chars().next(), Some('^'));
    assert_eq!(lines[at + 2], "; error[V07]: %y is returned but not defined");
    assert!(lines[0].starts_with("layer @0 (%x: f16[B,S,4])"));
}
