//! Models that take images: the ops against plain loops, and what sessions and calibration make of images, or of none.

use awqc_exec::interp::ops::{image, memory, rows};
use awqc_exec::{Host, HostExecutor, Logits, Session, Val, interp::upload};
use awqc_ir::op::{Count, CrossSdpa, Cut, Merge, Patches, Place};
use awqc_ir::{Module, RegionName, verify};
use awqc_passes::{Afterwards, ExecError, Executor, Tensor};
use burn_backend::tensor::{FloatTensor, IntTensor};

use crate::support::{Random, diff, module, weights, windows};

/// Images of 7 by 5 pixels are 3 by 2 patches; a text sees them as rows at token 9, and by attention to the image
/// before.
const TEXT: &str = r#"awqir 1
model "tiny" {dtype=f16}
dim B, S, N

region @vision (%pixels: f16[N,2,7,5]) {
  $w = "patch.weight" : f16[8,8]
  $c = "class"        : f16[8]
  $p = "pos.weight"   : f16[7,8]
  %a = patches %pixels {size=2}
  %b = linear %a, $w
  %c = learned %b, $c
  %d = append %c, %b
  %e = learned %d, $p
  %x = add %d, %e
  return %x
}

region @vision.0..1 (%x: f16[N,7,8]) from "vision.{i}" {
  $n = "norm"   : f16[8]
  $v = "weight" : f16[8,8]
  %h = layer_norm %x, $n {eps=1e-5}
  %q = linear %h, $v
  %a = sdpa %q, %q, %q {heads=2, kv_heads=2}
  %y = add %x, %a
  return %y
}

region @projector (%x: f16[N,7,8]) {
  %y = cut %x {start=1, len=6}
  return %y
}

region @embed (%images: f16[N,6,8], %ids: i32[B,S], %pos: i32[S]) {
  $e = "embed.weight" : f16[20,8]
  %t = embedding %ids, $e
  %x = place %t, %ids, %images {token=9}
  %n = count %ids {token=11}
  return %x, %images, %n
}

layer @0 (%x: f16[B,S,8], %images: f16[N,6,8], %n: i32[B,S]) {
  $g = "gate"   : f16[1]
  $w = "weight" : f16[8,8]
  %s = sdpa %x, %x, %x {causal, heads=2, kv_heads=2}
  %k = linear %images, $w
  %c = cross_sdpa %x, %k, %k, %n {heads=2, kv_heads=2}
  %o = gate %c, $g
  %y = add %s, %o
  return %y
}

region @head (%x: f16[B,S,8]) {
  $e = "embed.weight" : f16[20,8]
  %y = linear %x, $e
  return %y
}
"#;

fn session(module: &Module) -> Session<Host> {
    Session::new(verify(module).unwrap(), &weights(module), Default::default()).unwrap()
}

fn pixels(count: usize) -> Tensor {
    Tensor { shape: vec![count, 2, 7, 5], data: Random(5).numbers(count * 70) }
}

fn float(shape: &[usize], data: &[f32]) -> FloatTensor<Host> {
    upload::<Host>(Tensor { shape: shape.to_vec(), data: data.to_vec() }, &Default::default())
}

fn ints(shape: &[usize], data: &[i32]) -> IntTensor<Host> {
    let Val::Int(ids) = Val::<Host>::ints(data.to_vec(), shape, &Default::default()) else { panic!() };
    ids
}

fn numbers(t: FloatTensor<Host>) -> Tensor {
    Val::<Host>::Float(t).to_tensor().unwrap()
}

/// The text of two images of which one stands in its rows, the other is seen by attention: the prompt of a test.
fn prompt() -> Vec<i32> {
    vec![3, 9, 9, 9, 9, 9, 9, 11, 4, 5]
}

#[test]
fn patches_are_squares_in_reading_order() {
    let data: Vec<f32> = (0..2 * 2 * 7 * 5).map(|v| v as f32).collect();
    let got = numbers(image::patches::<Host>(&Patches { size: 2 }, float(&[2, 2, 7, 5], &data)));
    assert_eq!(got.shape, [2, 6, 8]);
    let mut want = Vec::new();
    for n in 0..2 {
        for (py, px) in (0..3).flat_map(|y| (0..2).map(move |x| (y, x))) {
            for c in 0..2 {
                for (dy, dx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    want.push(data[((n * 2 + c) * 7 + 2 * py + dy) * 5 + 2 * px + dx]);
                }
            }
        }
    }
    assert_eq!(got.data, want);
}

#[test]
fn merged_squares_have_zeros_beyond_the_edge() {
    let data: Vec<f32> = (0..9 * 2).map(|v| 1.0 + v as f32).collect();
    let got = numbers(image::merge::<Host>(&Merge { side: 3, by: 2 }, float(&[1, 9, 2], &data)));
    assert_eq!(got.shape, [1, 4, 8]);
    assert_eq!(&got.data[..8], [1.0, 2.0, 3.0, 4.0, 7.0, 8.0, 9.0, 10.0]);
    assert_eq!(&got.data[8..16], [5.0, 6.0, 0.0, 0.0, 11.0, 12.0, 0.0, 0.0]);
    assert_eq!(&got.data[24..], [17.0, 18.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let whole = numbers(image::merge::<Host>(&Merge { side: 2, by: 2 }, float(&[1, 4, 2], &data[..8])));
    assert_eq!((whole.shape.as_slice(), whole.data.as_slice()), (&[1, 1, 8][..], &data[..8]));
}

#[test]
fn rows_are_learned_appended_and_cut() {
    let w = float(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let learned = rows::learned::<Host>(2, w.clone());
    assert_eq!(numbers(learned.clone()).shape, [2, 2, 3]);
    assert_eq!(numbers(rows::learned::<Host>(0, w)).shape, [0, 2, 3]);
    let other = float(&[2, 1, 3], &[7.0, 8.0, 9.0, -7.0, -8.0, -9.0]);
    let all = rows::append::<Host>(learned, other);
    let cut = numbers(rows::cut::<Host>(&Cut { start: 1, len: 2 }, all));
    assert_eq!(cut.data, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 4.0, 5.0, 6.0, -7.0, -8.0, -9.0]);
}

#[test]
fn rows_of_images_take_their_places_in_order() {
    let (x, f) = (Random(1).numbers(2 * 3 * 2), Random(2).numbers(2 * 2 * 2));
    let place = |ids: &[i32]| {
        let (x, f) = (float(&[2, 3, 2], &x), float(&[2, 2, 2], &f));
        image::place::<Host>(&Place { token: 7 }, x, ints(&[2, 3], ids), f).map(numbers)
    };
    let got = place(&[7, 1, 7, 7, 7, 2]).unwrap().data;
    assert_eq!(got, [&f[0..2], &x[2..4], &f[2..4], &f[4..8], &x[10..12]].concat());
    assert_eq!(place(&[1, 2, 3, 4, 5, 6]).unwrap().data, x);
    let e = place(&[7, 1, 7, 7, 1, 2]).unwrap_err();
    assert!(e.contains("3 image tokens (7)") && e.contains("2 images of 2 rows need 4"), "{e}");
}

#[test]
fn counts_go_on_where_they_stopped() {
    let op = Count { token: 7 };
    let count = |ids: &[i32], seq: usize, seen: Option<&mut Vec<i32>>| {
        memory::count::<Host>(&op, ints(&[2, seq], ids), seen, &Default::default()).map(|v| v.to_tensor().unwrap().data)
    };
    assert_eq!(count(&[7, 1, 7, 1, 1, 7], 3, None).unwrap(), [1.0, 1.0, 2.0, 0.0, 0.0, 1.0]);
    let mut seen = Vec::new();
    count(&[7, 1, 1, 1], 2, Some(&mut seen)).unwrap();
    assert_eq!(count(&[7, 7], 1, Some(&mut seen)).unwrap(), [2.0, 1.0]);
    let e = memory::count::<Host>(&op, ints(&[1, 1], &[7]), Some(&mut seen), &Default::default()).unwrap_err();
    assert!(e.contains("2 sequences"), "{e}");
}

#[test]
fn each_token_attends_to_its_piece() {
    // Two sequences of two pieces; four query heads on two key/value heads.
    let op = CrossSdpa { heads: 4, kv_heads: 2, scale: Some(0.7) };
    let which = [0, 1, 2, 2, 2, 1, 0, 1];
    let (q, k, v) = (Random(1).numbers(2 * 4 * 12), Random(2).numbers(4 * 5 * 6), Random(3).numbers(4 * 5 * 4));
    let mut want = vec![0.0f32; 2 * 4 * 8];
    for (at, piece) in which.iter().enumerate().filter(|(_, p)| **p > 0) {
        let piece = at / 4 * 2 + piece - 1;
        for h in 0..4 {
            let kv = h / 2;
            let score = |l: usize| -> f32 {
                let (q, k) = (&q[at * 12 + h * 3..][..3], &k[(piece * 5 + l) * 6 + kv * 3..][..3]);
                0.7 * q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>()
            };
            let e: Vec<f32> = (0..5).map(|l| score(l).exp()).collect();
            let sum: f32 = e.iter().sum();
            for c in 0..2 {
                let value = |l: usize| v[(piece * 5 + l) * 4 + kv * 2 + c];
                want[at * 8 + h * 2 + c] = (0..5).map(|l| e[l] / sum * value(l)).sum();
            }
        }
    }
    let attend = |which: &[usize], k: &[f32], v: &[f32], n: usize| {
        let which: Vec<i32> = which.iter().map(|w| *w as i32).collect();
        let (k, v) = (float(&[n, 5, 6], k), float(&[n, 5, 4], v));
        memory::cross_sdpa::<Host>(&op, float(&[2, 4, 12], &q), k, v, ints(&[2, 4], &which)).map(numbers)
    };
    let got = attend(&which, &k, &v, 4).unwrap();
    assert_eq!(got.shape, [2, 4, 8]);
    assert!(diff(&got.data, &want) < 1e-5, "{}", diff(&got.data, &want));
    // Without images nothing is seen.
    assert_eq!(attend(&[0; 8], &[], &[], 0).unwrap().data, [0.0; 64]);
    let e = attend(&[3; 8], &k, &v, 4).unwrap_err();
    assert!(e.contains("image 3, 2 are given"), "{e}");
    let e = attend(&which, &k[..90], &v[..60], 3).unwrap_err();
    assert!(e.contains("3 images cannot be shared out to 2 sequences"), "{e}");
}

#[test]
fn images_are_seen_once_and_remembered() {
    let m = module(TEXT);
    assert_eq!((m.eye(), m.images().unwrap().tokens), (4, 1));
    let mut s = session(&m);
    let mut eye = Vec::new();
    s.see(pixels(1), &mut |region, t| {
        eye.push((region.name.to_string(), t.shape));
        Ok(())
    })
    .unwrap();
    assert_eq!(
        eye.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(),
        ["@vision", "@vision.0", "@vision.1", "@projector"]
    );
    assert_eq!(eye[3].1, [1, 6, 8]);
    let whole = s.forward(&prompt(), Logits::All).unwrap();
    // Token by token behind the image: the same.
    s.see(pixels(1), &mut |_, _| Ok(())).unwrap();
    let mut pieces = s.forward(&prompt()[..7], Logits::All).unwrap().data;
    for id in &prompt()[7..] {
        pieces.extend(s.forward(&[*id], Logits::Last).unwrap().data);
    }
    assert!(diff(&pieces, &whole.data) < 1e-5);
    // Another image gives other logits behind it, and the same before it.
    let mut other = pixels(1);
    other.data.iter_mut().for_each(|v| *v *= -1.5);
    s.see(other, &mut |_, _| Ok(())).unwrap();
    let changed = s.forward(&prompt(), Logits::All).unwrap();
    assert!(diff(&changed.data[..20], &whole.data[..20]) < 1e-6);
    assert!(diff(&changed.data[180..], &whole.data[180..]) > 1e-3);
}

#[test]
fn a_batch_shares_its_images_out() {
    let m = module(TEXT);
    let (mut s, both) = (session(&m), pixels(2));
    let rows = [prompt(), vec![9, 9, 9, 9, 9, 9, 2, 11, 5, 1]];
    s.see(both.clone(), &mut |_, _| Ok(())).unwrap();
    let together = s.forward_batch(&[&rows[0], &rows[1]], Logits::All).unwrap().data;
    for (i, row) in rows.iter().enumerate() {
        let one = Tensor { shape: vec![1, 2, 7, 5], data: both.data[i * 70..][..70].to_vec() };
        s.see(one, &mut |_, _| Ok(())).unwrap();
        let alone = s.forward(row, Logits::All).unwrap().data;
        assert!(diff(&alone, &together[i * 200..][..200]) < 1e-5);
    }
}

#[test]
fn a_text_without_images_is_a_text() {
    let m = module(TEXT);
    let mut s = session(&m);
    let ids = [1, 2, 3, 4];
    let first = s.forward(&ids, Logits::All).unwrap();
    s.see(pixels(1), &mut |_, _| Ok(())).unwrap();
    s.reset();
    assert_eq!(s.forward(&ids, Logits::All).unwrap(), first);
    s.reset();
    let e = s.forward(&prompt(), Logits::All).unwrap_err().to_string();
    assert!(e.contains("@embed") && e.contains("6 image tokens (9)") && e.contains("0 images"), "{e}");
    let e = s.forward(&[11, 1], Logits::All).unwrap_err().to_string();
    assert!(e.contains("@0") && e.contains("image 1, 0 are given"), "{e}");
}

#[test]
fn wrong_images_are_refused() {
    let m = module(TEXT);
    let mut s = session(&m);
    let e = s.see(Tensor { shape: vec![1, 2, 5, 7], data: vec![0.0; 70] }, &mut |_, _| Ok(())).unwrap_err();
    assert!(matches!(&e, ExecError::Tensor(t) if t.contains("%pixels") && t.contains("[1, 2, 5, 7]")), "{e}");
    let text = module(crate::support::DECODER);
    let e = session(&text).see(pixels(1), &mut |_, _| Ok(())).unwrap_err();
    assert!(e.to_string().contains("takes text alone"), "{e}");
}

#[test]
fn calibration_on_text_passes_the_eye_by() {
    let m = module(TEXT);
    let text: Vec<Vec<i32>> = windows(&[12, 9], 8);
    let mut exec = HostExecutor::new(std::sync::Arc::new(weights(&m))).with_calibration(&text).unwrap();
    for region in &m.regions {
        let inputs: Vec<_> = region.value_params().filter(|v| region.value(*v).ty.elem.is_float()).collect();
        let stats = exec.profile(region, &m.fused, &inputs[..1], Afterwards::Exit).unwrap();
        let seen = if region.name.is_layer() || region.name == RegionName::Named("head".into()) { 21 } else { 0 };
        assert_eq!(stats[0].tokens, seen, "{}", region.name);
        // Passes are checked on made-up images where there are none.
        let outputs = exec.evaluate(region, &m.fused, &region.results()[..1]).unwrap();
        assert!(!outputs[0].data.is_empty() && outputs[0].data.iter().any(|v| *v != 0.0), "{}", region.name);
    }
}
