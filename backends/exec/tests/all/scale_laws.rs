//! Every op obeys its scale law: op(D·x; D·params) = D·op(x; params) for a random solution D of the law's equations.

use std::collections::{BTreeMap, BTreeSet};

use awqc_exec::{Host, Interpreter, Val, Weights, interp::upload};
use awqc_ir::op::law::{ChannelMap, Law, Port, Sense};
use awqc_ir::op::{
    Add, Alibi, Append, Clamp, Combine, Concat, Count, CrossSdpa, Cut, Dispatch, Embedding, Gate, Gelu, GroupScore,
    Groups, LayerNorm, Learned, Linear, Merge, Mul, Patches, Place, Relu, Repeat, RmsNorm, Rope, Scale, Sdpa, Sigmoid,
    Silu, Softcap, Softmax, Split, TopK,
};
use awqc_ir::{Dim, Elem, Op, Operand, Region, RegionName, Type, WeightExpr, WeightId};
use awqc_passes::Tensor;

use crate::support::{Random, diff};

/// An unknown: the log scale of one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unknown {
    Value(usize, u64),
    Result(usize, u64),
    Parameter(usize, usize, u64),
}

fn unknown(port: Port, c: u64) -> Unknown {
    match port {
        Port::Operand(i) => Unknown::Value(i, c),
        Port::Result(i) => Unknown::Result(i, c),
    }
}

type Equation = BTreeMap<Unknown, f64>;

/// Experts and channels of a value.
type Sizes = (u64, u64);

/// The unknowns of `left` with those of `right` that `map` gives them; what is there once goes for all experts.
fn pairs(left: Sizes, right: Sizes, map: ChannelMap) -> Vec<(u64, u64)> {
    let other = |e: u64, c: u64| if right.0 == 1 { map.apply(c) } else { e * right.1 + map.apply(c) };
    (0..left.0).flat_map(|e| (0..left.1).map(move |c| (e * left.1 + c, other(e, c)))).collect()
}

/// The equations of a law: each sums to 0.
fn equations(law: Law, sizes: &dyn Fn(Port) -> Sizes, weights: &dyn Fn(usize, usize) -> Sizes) -> Vec<Equation> {
    let channels = |p: Port| sizes(p).0 * sizes(p).1;
    let row = |terms: &[(Unknown, f64)]| {
        let mut row = Equation::new();
        terms.iter().for_each(|(u, k)| *row.entry(*u).or_default() += k);
        row
    };
    match law {
        Law::Pin(p) => (0..channels(p)).map(|c| row(&[(unknown(p, c), 1.0)])).collect(),
        Law::Tie { left, right, map } => pairs(sizes(left), sizes(right), map)
            .into_iter()
            .map(|(l, r)| row(&[(unknown(left, l), 1.0), (unknown(right, r), -1.0)]))
            .collect(),
        Law::Product { product, a, b } => (0..channels(product))
            .map(|c| row(&[(unknown(product, c), 1.0), (unknown(a, c), -1.0), (unknown(b, c), -1.0)]))
            .collect(),
        Law::Parameter { operand, axis, value, sense, map, .. } => {
            let sign = match sense {
                Sense::Along => -1.0,
                Sense::Against => 1.0,
            };
            pairs(sizes(value), weights(operand, axis), map)
                .into_iter()
                .map(|(v, p)| row(&[(Unknown::Parameter(operand, axis, p), 1.0), (unknown(value, v), sign)]))
                .collect()
        }
    }
}

/// A random solution of the homogeneous system, by elimination.
fn solve(mut rows: Vec<Equation>, random: &mut Random) -> BTreeMap<Unknown, f64> {
    let mut pivots: Vec<(Unknown, Equation)> = Vec::new();
    while let Some(mut row) = rows.pop() {
        for (pivot, known) in &pivots {
            if let Some(k) = row.get(pivot).copied() {
                known.iter().for_each(|(u, v)| *row.entry(*u).or_default() -= k * v);
            }
        }
        row.retain(|_, v| v.abs() > 1e-9);
        let Some((&pivot, &k)) = row.iter().next() else { continue };
        row.values_mut().for_each(|v| *v /= k);
        pivots.push((pivot, row));
    }
    let bound: BTreeSet<Unknown> = pivots.iter().map(|(p, _)| *p).collect();
    let mut scales: BTreeMap<Unknown, f64> = BTreeMap::new();
    for (_, row) in &pivots {
        for u in row.keys().filter(|u| !bound.contains(u)) {
            scales.entry(*u).or_insert_with(|| f64::from(random.number()));
        }
    }
    for (pivot, row) in pivots.iter().rev() {
        let rest: f64 =
            row.iter().filter(|(u, _)| *u != pivot).map(|(u, k)| k * scales.get(u).copied().unwrap_or(0.0)).sum();
        scales.insert(*pivot, -rest);
    }
    scales
}

struct Case {
    op: Op,
    /// Value operands by shape; `None` for weights.
    shapes: Vec<(Vec<usize>, bool)>,
    /// Whether the law leaves anything free.
    free: bool,
}

fn value(shape: &[usize]) -> (Vec<usize>, bool) {
    (shape.to_vec(), false)
}

fn weight(shape: &[usize]) -> (Vec<usize>, bool) {
    (shape.to_vec(), true)
}

fn cases() -> Vec<Case> {
    let x = || value(&[2, 5, 12]);
    let case = |op: Op, shapes: Vec<(Vec<usize>, bool)>, free: bool| Case { op, shapes, free };
    let groups = Some(Groups { count: 4, keep: 2, by: GroupScore::TwoBest });
    let top_k = TopK { k: 3, groups, normalize: false, scale: Some(1.5), near: None };
    let sdpa = Sdpa { causal: true, heads: 6, kv_heads: 2, scale: None, window: Some(3), softcap: None, alibi: None };
    vec![
        case(Embedding { offset: 1 }.into(), vec![value(&[2, 5]), weight(&[9, 7])], true),
        case(Linear {}.into(), vec![x(), weight(&[7, 12])], true),
        case(Linear {}.into(), vec![x(), weight(&[7, 12]), weight(&[7])], true),
        case(RmsNorm { eps: 1e-3, offset: 0.0, heads: None }.into(), vec![x()], false),
        case(RmsNorm { eps: 1e-3, offset: 0.0, heads: None }.into(), vec![x(), weight(&[12])], true),
        case(RmsNorm { eps: 1e-3, offset: 1.0, heads: Some(3) }.into(), vec![x(), weight(&[4])], true),
        case(LayerNorm { eps: 1e-3, heads: None }.into(), vec![x()], false),
        case(LayerNorm { eps: 1e-3, heads: None }.into(), vec![x(), weight(&[12])], true),
        case(LayerNorm { eps: 1e-3, heads: None }.into(), vec![x(), weight(&[12]), weight(&[12])], true),
        case(LayerNorm { eps: 1e-3, heads: Some(3) }.into(), vec![x(), weight(&[4]), weight(&[4])], true),
        case(LayerNorm { eps: 1e-3, heads: Some(3) }.into(), vec![x(), weight(&[3, 4])], false),
        case(Rope { heads: 2, interleaved: false }.into(), vec![x(), value(&[5, 2]), value(&[5, 2])], false),
        case(
            Sdpa { alibi: Some(Alibi { max: 8.0, scale: 0.5 }), ..sdpa.clone() }.into(),
            vec![x(), value(&[2, 5, 4]), value(&[2, 5, 6])],
            true,
        ),
        case(sdpa.into(), vec![x(), value(&[2, 5, 4]), value(&[2, 5, 6])], true),
        case(Silu {}.into(), vec![x()], false),
        case(Sigmoid {}.into(), vec![x()], false),
        case(Gelu::default().into(), vec![x()], false),
        case(Relu {}.into(), vec![x()], true),
        case(Add {}.into(), vec![x(), x()], true),
        case(Add {}.into(), vec![x(), value(&[12])], true),
        case(Mul {}.into(), vec![x(), x()], true),
        case(Scale { by: -0.3 }.into(), vec![x()], true),
        case(Softcap { at: 2.0 }.into(), vec![x()], false),
        case(Clamp { at: 0.8 }.into(), vec![x()], false),
        case(Split::new(vec![3, 1, 8]).into(), vec![x()], true),
        case(Split { sizes: vec![1, 3], heads: 3 }.into(), vec![x()], true),
        case(Concat::default().into(), vec![x(), value(&[2, 5, 3])], true),
        case(Concat { heads: 3 }.into(), vec![x(), value(&[2, 5, 3])], true),
        case(Repeat { times: 3 }.into(), vec![x()], true),
        case(Softmax {}.into(), vec![x()], false),
        case(top_k.clone().into(), vec![x()], false),
        case(TopK { normalize: true, ..top_k }.into(), vec![x(), weight(&[12])], false),
        case(Dispatch { experts: 3 }.into(), vec![x(), value(&[2, 5, 2])], true),
        case(Linear {}.into(), vec![value(&[3, 2, 5, 12]), weight(&[3, 7, 12])], true),
        case(Combine {}.into(), vec![value(&[3, 2, 5, 12]), value(&[2, 5, 2]), value(&[2, 5, 2])], true),
        case(Patches { size: 2 }.into(), vec![value(&[2, 3, 4, 6])], false),
        case(Merge { side: 3, by: 2 }.into(), vec![value(&[2, 9, 12])], true),
        case(Place { token: 2 }.into(), vec![x(), value(&[2, 5]), value(&[2, 3, 12])], true),
        case(Learned {}.into(), vec![x(), weight(&[3, 7])], true),
        case(Learned {}.into(), vec![x(), weight(&[7])], true),
        case(Append {}.into(), vec![x(), value(&[2, 3, 12])], true),
        case(Cut { start: 1, len: 3 }.into(), vec![x()], true),
        case(Count { token: 1 }.into(), vec![value(&[2, 5])], false),
        case(
            CrossSdpa { heads: 6, kv_heads: 2, scale: None }.into(),
            vec![x(), value(&[4, 3, 4]), value(&[4, 3, 6]), value(&[2, 5])],
            true,
        ),
        case(Gate {}.into(), vec![x(), weight(&[1])], true),
    ]
}

/// A region of one op, and random numbers for its operands.
fn region(case: &Case, random: &mut Random) -> (Region, Vec<Tensor>) {
    let mut region = Region::new(RegionName::Named("one".into()), "");
    let (mut operands, mut numbers) = (Vec::new(), Vec::new());
    for (i, (shape, is_weight)) in case.shapes.iter().enumerate() {
        let ids = match &case.op {
            Op::Embedding(_) | Op::Count(_) => i == 0,
            Op::Dispatch(_) | Op::Place(_) => i == 1,
            Op::Combine(_) => i == 2,
            Op::CrossSdpa(_) => i == 3,
            _ => false,
        };
        let below = if matches!(case.op, Op::Embedding(_)) { 8 } else { 3 };
        let ty = Type::new(if ids { Elem::I32 } else { Elem::F32 }, shape.iter().map(|n| Dim::Const(*n as u64)));
        operands.push(match is_weight {
            true => Operand::Weight(region.add_weight(None, WeightExpr::Source(format!("w{i}").into()), ty)),
            false => Operand::Value(region.add_param(format!("x{i}"), ty)),
        });
        let n = shape.iter().product();
        // As many image tokens as there are rows for them.
        let places = |at: usize| if at % 5 < 3 { 2.0 } else { 0.0 };
        let data = if ids && matches!(case.op, Op::Place(_)) {
            (0..n).map(places).collect()
        } else if ids {
            (0..n).map(|_| (random.bits() % below) as f32).collect()
        } else {
            random.numbers(n)
        };
        numbers.push(Tensor { shape: shape.clone(), data });
    }
    let node = region.append(case.op.clone(), operands, &[], &[]).unwrap();
    region.set_results(region.node(node).results.clone());
    (region, numbers)
}

fn run(region: &Region, numbers: &[Tensor]) -> Vec<Tensor> {
    let device = Default::default();
    let mut weights = Weights::<Host>::empty();
    let mut inputs = Vec::new();
    let mut next = 0;
    for (operand, tensor) in region.nodes().next().unwrap().1.operands.iter().zip(numbers) {
        match operand {
            Operand::Weight(_) => {
                weights.insert(WeightId::new(next), upload::<Host>(tensor.clone(), &device));
                next += 1;
            }
            Operand::Value(v) if region.value(*v).ty.elem == Elem::I32 => {
                inputs.push(Val::ints(tensor.data.iter().map(|v| *v as i32).collect(), &tensor.shape, &device));
            }
            Operand::Value(_) => inputs.push(Val::floats(tensor.clone(), &device)),
        }
    }
    let interpreter = Interpreter::<Host> { fused: &[], device: &device };
    let out = interpreter.run(region, &weights, inputs, None, &mut |_, _| Ok(())).unwrap();
    out.iter().map(|v| v.to_tensor().unwrap()).collect()
}

#[test]
fn ops_obey_their_laws() {
    let mut random = Random(1);
    for case in cases() {
        let (region, numbers) = region(&case, &mut random);
        let node = region.nodes().next().unwrap().1.clone();
        let operands: Vec<Type> = node.operands.iter().map(|o| region.operand_type(*o).clone()).collect();
        let results: Vec<Type> = node.results.iter().map(|r| region.value(*r).ty.clone()).collect();
        let laws = node.op.scale_law(&operands.iter().collect::<Vec<_>>(), &results.iter().collect::<Vec<_>>());
        let of = |ty: &Type| (ty.experts(), ty.channels().unwrap());
        let sizes = |port: Port| match port {
            Port::Operand(i) => of(&operands[i]),
            Port::Result(i) => of(&results[i]),
        };
        let weights = |i: usize, axis: usize| {
            let n = operands[i].shape[axis].as_const().unwrap();
            (operands[i].channels_of_all(axis).map_or(1, |all| all / n), n)
        };
        let offset = laws.iter().find_map(|l| match l {
            Law::Parameter { offset, .. } => Some(*offset as f32),
            Law::Pin(_) | Law::Tie { .. } | Law::Product { .. } => None,
        });
        let rows = laws.iter().flat_map(|l| equations(*l, &sizes, &weights)).collect();
        let scales = solve(rows, &mut random);
        let largest = scales.values().fold(0.0f64, |m, v| m.max(v.abs()));
        assert_eq!(largest > 0.1, case.free, "{:?}: what is free", case.op);
        let factor = |u: Unknown| scales.get(&u).copied().unwrap_or(0.0).exp() as f32;

        let plain = run(&region, &numbers);
        let mut scaled = numbers.clone();
        for (i, (tensor, (shape, is_weight))) in scaled.iter_mut().zip(&case.shapes).enumerate() {
            // The other operands are numbers of experts.
            if operands[i].elem == Elem::I32 {
                continue;
            }
            for axis in 0..shape.len() {
                if !is_weight && axis + 1 < shape.len() {
                    continue;
                }
                let inner: usize = shape[axis + 1..].iter().product();
                // The channels of several experts count through.
                let stacked = shape.len() == if *is_weight { 3 } else { 4 } && axis > 0;
                let size = if stacked { shape[1..].iter().product() } else { usize::MAX };
                let add = if *is_weight { offset.unwrap_or(0.0) } else { 0.0 };
                for (at, v) in tensor.data.iter_mut().enumerate() {
                    let c = (at / size * shape[axis] + at / inner % shape[axis]) as u64;
                    let k = factor(if *is_weight { Unknown::Parameter(i, axis, c) } else { Unknown::Value(i, c) });
                    *v = (*v + add) * k - add;
                }
            }
        }
        let got = run(&region, &scaled);
        for (r, (got, plain)) in got.iter().zip(&plain).enumerate() {
            let cols = plain.cols();
            let want: Vec<f32> = plain
                .data
                .iter()
                .enumerate()
                .map(|(at, v)| {
                    let e = at / (plain.data.len() / results[r].experts() as usize).max(1);
                    v * factor(Unknown::Result(r, (e * cols + at % cols) as u64))
                })
                .collect();
            let size = want.iter().fold(1.0f32, |m, v| m.max(v.abs()));
            assert!(
                diff(&got.data, &want) <= 2e-5 * size,
                "{:?}: result {r} differs by {}",
                case.op,
                diff(&got.data, &want)
            );
        }
    }
}

#[test]
fn every_op_is_covered() {
    let mut tested: BTreeSet<&str> = cases().iter().map(|c| c.op.mnemonic()).collect();
    // Nothing is free in these: angles, a call, whose freedom is that of its inlined body, and what has no meaning yet.
    tested.extend(["rope_table", "fused", "foreign"]);
    assert_eq!(tested, Op::MNEMONICS.iter().copied().collect());
}
