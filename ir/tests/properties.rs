//! Properties of the language on random modules and random texts.

use awqc_ir::op::{
    Add, Concat, Embedding, Gelu, GeluForm, LayerNorm, Linear, Mul, Relu, RmsNorm, Rope, RopeScaling, RopeTable,
};
use awqc_ir::op::{Scale, Sdpa, Silu, Softcap, Split};
use awqc_ir::view::isomorphic;
use awqc_ir::{
    Data, DataId, DataMap, DataRef, Dim, Elem, FusedDef, Group, Layout, Module, Op, Operand, Quant, Region, RegionName,
    Type, ValueId, WeightExpr, WeightId, outline, parse, print, print_region, verify,
};
use proptest::prelude::*;

/// A source of choices: the numbers of a random list, then zeros.
struct Dice<'a>(&'a [u32]);

impl Dice<'_> {
    fn roll(&mut self, sides: usize) -> usize {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first as usize % sides
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.roll(items.len())]
    }

    fn done(&self) -> bool {
        self.0.is_empty()
    }
}

const NAMES: [&str; 10] = ["x", "y", "h1", "", "a b", "é", "x.1", "if", "7", "q\"\\\n{i}"];
const FLOATS: [Elem; 3] = [Elem::F16, Elem::F32, Elem::Bf16];

fn channels(region: &Region, v: ValueId) -> u64 {
    region.value(v).ty.channels().expect("every value has constant channels")
}

fn name(d: &mut Dice<'_>) -> Option<awqc_ir::Name> {
    (d.roll(3) > 0).then(|| d.of(&NAMES).into())
}

fn data(r: &mut Region, d: &mut Dice<'_>, shape: Vec<u64>) -> DataId {
    let (name, label) = (d.of(&NAMES).into(), d.of(&NAMES).into());
    r.add_data(Data { name, label, shape, values: None })
}

/// A float term of this shape.
fn float(r: &mut Region, d: &mut Dice<'_>, shape: &[u64], depth: usize) -> WeightId {
    let ty = Type::new(d.of(&FLOATS), shape.iter().copied().map(Dim::Const));
    let kind = if depth == 0 { 0 } else { d.roll(9) };
    let rows = shape[0];
    let expr = match kind {
        1 | 2 => {
            let axis = d.roll(shape.len());
            let len = shape[axis];
            let (id, map) = match d.roll(3) {
                0 if len.is_multiple_of(2) => (data(r, d, vec![len / 2]), DataMap::Tie { width: len / 2, times: 2 }),
                1 => (data(r, d, vec![1]), DataMap::Within { start: 0, total: len }),
                _ => (data(r, d, vec![len]), DataMap::Whole),
            };
            let (of, by) = (float(r, d, shape, depth - 1), DataRef { id, map });
            if kind == 1 { WeightExpr::Mul { axis, of, by } } else { WeightExpr::Div { axis, of, by } }
        }
        3 => WeightExpr::Offset { of: float(r, d, shape, depth - 1), by: d.of(&[1.0, -0.5, 1e-7, 3e20]) },
        4 => {
            let mut parts = Vec::new();
            let elem = d.of(&FLOATS);
            for rows in [1, rows.max(2) - 1] {
                let part = [&[rows], &shape[1..]].concat();
                let id = float(r, d, &part, depth - 1);
                let ty = r.weight(id).ty.with_elem(elem);
                // Parts have one element type; a term that is rounded to it is one.
                let same = r.weight(id).ty == ty;
                parts.push(if same { id } else { r.add_weight(None, WeightExpr::Offset { of: id, by: 0.0 }, ty) });
            }
            if rows < 2 {
                parts.pop();
            }
            WeightExpr::Cat { axis: 0, parts }
        }
        5 => WeightExpr::Rows { of: float(r, d, &[&[rows + 3], &shape[1..]].concat(), depth - 1), start: 2, len: rows },
        6 if shape.len() == 2 => WeightExpr::Transpose(float(r, d, &[shape[1], shape[0]], depth - 1)),
        7 if shape.len() == 2 => {
            let group = d.of(&[Group::Row, Group::Size(2), Group::Size(3)]);
            let bounds = vec![rows, group.count(shape[1] as usize) as u64];
            let (lo, hi) = (data(r, d, bounds.clone()), data(r, d, bounds));
            WeightExpr::Clip { of: float(r, d, shape, depth - 1), lo, hi, group }
        }
        8 if r.weight_ids().next().is_some() => {
            // The same term once more.
            let earlier: Vec<WeightId> = r.weight_ids().filter(|w| r.weight(*w).ty == ty).collect();
            match earlier.is_empty() {
                true => WeightExpr::Source(d.of(&NAMES).into()),
                false => return earlier[d.roll(earlier.len())],
            }
        }
        _ => WeightExpr::Source(d.of(&NAMES).into()),
    };
    let name = name(d);
    r.add_weight(name, expr, ty)
}

/// A float or quantized matrix.
fn matrix(r: &mut Region, d: &mut Dice<'_>, out: u64, input: u64) -> WeightId {
    let quant =
        Quant { bits: d.of(&Quant::BITS), symmetric: d.roll(2) > 0, group: d.of(&[Group::Row, Group::Size(2)]) };
    let ty = |layout| Type { elem: Elem::Quant(quant), layout, shape: vec![out.into(), input.into()] };
    let kind = d.roll(5);
    if kind == 0 {
        let (tensor, name) = (d.of(&NAMES).into(), name(d));
        return r.add_weight(name, WeightExpr::Packed { tensor, layout: Layout::Rows }, ty(Some(Layout::Rows)));
    }
    let of = float(r, d, &[out, input], 3);
    if kind == 1 {
        return of;
    }
    let expr = match kind {
        2 | 3 => WeightExpr::Quant(of),
        _ => {
            let codes = data(r, d, vec![out, input]);
            let groups = vec![out, quant.group.count(input as usize) as u64];
            let (scales, zeros) = (data(r, d, groups.clone()), data(r, d, groups));
            WeightExpr::Codes { of, codes, scales, zeros }
        }
    };
    let named = name(d);
    let w = r.add_weight(named, expr, ty(None));
    if d.roll(2) == 0 {
        return w;
    }
    let named = name(d);
    r.add_weight(named, WeightExpr::Pack(w), ty(Some(Layout::Rows)))
}

/// A layer from `x: f16[B,S,4]` to the same.
fn layer(d: &mut Dice<'_>, index: u32, fused: &mut Vec<FusedDef>) -> Region {
    let mut r =
        Region::new(RegionName::Layer(index), d.of(&["", "m.{}.b", "l", "0.1.2"]).replace("{}", &index.to_string()));
    let sym = |s: &str| Dim::Sym(s.into());
    let x = r.add_param(d.of(&NAMES), Type::new(Elem::F16, [sym("B"), sym("S"), 4.into()]));
    let pos = r.add_param(d.of(&NAMES), Type::new(Elem::I32, [sym("S")]));
    let mut values = vec![x];
    while !d.done() {
        let a = d.of(&values);
        let c = channels(&r, a);
        let same: Vec<ValueId> = values.iter().copied().filter(|v| channels(&r, *v) == c).collect();
        let b = d.of(&same);
        let val = Operand::Value;
        let (op, operands): (Op, Vec<Operand>) = match d.roll(16) {
            0 => (Silu {}.into(), vec![val(a)]),
            1 => (Gelu { form: d.of(&[GeluForm::Erf, GeluForm::Tanh, GeluForm::Quick]) }.into(), vec![val(a)]),
            2 => (Relu {}.into(), vec![val(a)]),
            3 => (Add {}.into(), vec![val(a), val(b)]),
            4 => (Mul {}.into(), vec![val(a), val(b)]),
            5 => (Scale { by: d.of(&[0.1, 1.0, 1e-5, 12345678.9]) }.into(), vec![val(a)]),
            6 => (Softcap { at: 30.0 }.into(), vec![val(a)]),
            7 if c > 1 => (Split::new(vec![1, c - 1]).into(), vec![val(a)]),
            8 if c < 64 => (Concat::default().into(), vec![val(a), val(d.of(&values))]),
            9 => {
                let heads = (c.is_multiple_of(2) && d.roll(2) > 0).then_some(2);
                let g = float(&mut r, d, &[c / heads.unwrap_or(1)], 2);
                let op = RmsNorm { eps: 1e-6, offset: d.of(&[0.0, 1.0]), heads };
                (op.into(), vec![val(a), Operand::Weight(g)])
            }
            10 => {
                let (g, b) = (float(&mut r, d, &[c], 2), float(&mut r, d, &[c], 1));
                let all = [val(a), Operand::Weight(g), Operand::Weight(b)];
                (LayerNorm { eps: 1e-5, heads: None }.into(), all[..1 + d.roll(3)].to_vec())
            }
            11 if c.is_multiple_of(2) => {
                let window = (d.roll(2) > 0).then_some(5);
                let op = Sdpa {
                    causal: d.roll(2) > 0,
                    heads: 2,
                    kv_heads: 1 + d.roll(2) as u64,
                    scale: None,
                    window,
                    softcap: None,
                    alibi: None,
                };
                let kv: Vec<ValueId> =
                    values.iter().copied().filter(|v| channels(&r, *v) == c / 2 * op.kv_heads).collect();
                if kv.is_empty() {
                    continue;
                }
                (op.into(), vec![val(a), val(d.of(&kv)), val(d.of(&kv))])
            }
            12 if c.is_multiple_of(4) => {
                let scaling = match d.roll(3) {
                    0 => None,
                    1 => Some(RopeScaling::Linear { factor: 2.5 }),
                    _ => Some(RopeScaling::Long { short: vec![1.0], long: vec![2.5], original: 64.0, attention: 1.25 }),
                };
                let table = RopeTable { dim: 2, theta: 10000.0, scaling };
                let n = r.append(table.into(), vec![val(pos)], &["cos"], &[]).expect("the table fits");
                let [cos, sin] = r.node(n).results[..] else { panic!("a table has two results") };
                (Rope { heads: 2, interleaved: d.roll(2) > 0 }.into(), vec![val(a), val(cos), val(sin)])
            }
            13 => {
                let t = float(&mut r, d, &[9, c], 1);
                let n = r.append(Embedding { offset: 2 }.into(), vec![val(pos), Operand::Weight(t)], &[], &[]);
                let rows = r.node(n.expect("the table fits")).results[0];
                (Add {}.into(), vec![val(a), val(rows)])
            }
            14 => {
                // One earlier node becomes a fused call.
                let Some(id) = d.roll(r.order().len() + 1).checked_sub(1).map(|i| r.order()[i]) else { continue };
                let node = r.node(id).clone();
                let fused_now = outline(&mut r, fused, "f", &[id], &node.operands, &node.results);
                if let Ok(call) = fused_now {
                    let made = r.node(call).results.clone();
                    for v in &mut values {
                        if let Some(i) = node.results.iter().position(|old| old == v) {
                            *v = made[i];
                        }
                    }
                }
                continue;
            }
            _ => {
                let out = d.of(&[4, 6, 1, 8]);
                let w = matrix(&mut r, d, out, c);
                let mut operands = vec![val(a), Operand::Weight(w)];
                if d.roll(2) > 0 {
                    operands.push(Operand::Weight(float(&mut r, d, &[out], 2)));
                }
                (Linear {}.into(), operands)
            }
        };
        let names = [d.of(&NAMES), d.of(&NAMES)];
        let n = r.append(op, operands, &names, fused).expect("the operands were chosen to fit");
        let results = r.node(n).results.clone();
        values.extend(results);
    }
    let from = values.last().copied().unwrap_or(x);
    let input = channels(&r, from);
    let w = matrix(&mut r, d, 4, input);
    let n = r
        .append(Linear {}.into(), vec![Operand::Value(from), Operand::Weight(w)], &["out"], fused)
        .expect("the shapes fit");
    let sum = r.append(Add {}.into(), vec![Operand::Value(x), Operand::Value(r.node(n).results[0])], &["sum"], fused);
    let result = r.node(sum.expect("both have four channels")).results[0];
    r.set_results(vec![result]);
    r
}

fn module(choices: &[Vec<u32>], repeat: u32) -> Module {
    let mut module = Module::new("random", Elem::F16);
    let mut index = 0;
    for list in choices {
        for _ in 0..repeat {
            let mut fused = std::mem::take(&mut module.fused);
            module.regions.push(layer(&mut Dice(list), index, &mut fused));
            module.fused = fused;
            index += 1;
        }
    }
    module
}

/// What [`module`] makes a module of: printed in place of the module when a property fails.
fn choices() -> impl Strategy<Value = (Vec<Vec<u32>>, u32)> {
    (prop::collection::vec(prop::collection::vec(any::<u32>(), 0..120), 1..4), 1u32..3)
}

/// Every name of a region replaced.
fn renamed(region: &Region, names: &[u32]) -> Region {
    let mut out = region.clone();
    let mut d = Dice(names);
    for v in region.value_ids() {
        out.rename_value(v, format!("{}{}", d.of(&NAMES), d.roll(9)).into());
    }
    for w in region.weight_ids() {
        if region.weight(w).name.is_some() {
            out.rename_weight(w, Some(format!("{}{}", d.of(&NAMES), d.roll(9)).into()));
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn printing_and_parsing_keep_the_meaning_and_the_text((lists, repeat) in choices()) {
        let module = module(&lists, repeat);
        verify(&module).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let text = print(&module);
        let again = parse(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        verify(&again).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(&print(&again), &text);
        prop_assert_eq!(module.regions.len(), again.regions.len());
        for (a, b) in module.regions.iter().zip(&again.regions) {
            prop_assert_eq!(&a.name, &b.name);
            prop_assert_eq!(&a.prefix, &b.prefix);
            prop_assert!(isomorphic(a, b), "{}", text);
        }
        for (a, b) in module.fused.iter().zip(&again.fused) {
            prop_assert!(a.name == b.name && isomorphic(&a.body, &b.body), "{}", text);
        }
    }

    #[test]
    fn compaction_keeps_the_text((lists, repeat) in choices()) {
        let module = module(&lists, repeat);
        for region in &module.regions {
            let mut compact = region.clone();
            compact.compact();
            prop_assert!(isomorphic(region, &compact));
        }
        let mut compact = module.clone();
        compact.regions.iter_mut().for_each(|r| { r.compact(); });
        let text = print(&compact);
        prop_assert_eq!(print(&parse(&text).map_err(|e| TestCaseError::fail(e.to_string()))?), text);
    }

    #[test]
    fn names_do_not_matter((lists, repeat) in choices(), names in prop::collection::vec(any::<u32>(), 0..200)) {
        let module = module(&lists, repeat);
        for region in &module.regions {
            prop_assert!(isomorphic(region, &renamed(region, &names)));
        }
    }

    #[test]
    fn inlining_what_was_outlined_leaves_no_call((lists, repeat) in choices()) {
        let module = module(&lists, repeat);
        for region in &module.regions {
            let mut inlined = region.clone();
            awqc_ir::inline_fused(&mut inlined, &module.fused).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(inlined.nodes().all(|(_, n)| !matches!(n.op, Op::Fused(_))));
            let mut alone = Module::new("alone", Elem::F16);
            alone.regions.push(inlined);
            verify(&alone).map_err(|e| TestCaseError::fail(e.to_string()))?;
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
        let _ = parse(&text).map_err(|e| e.to_string());
        let _ = parse(&format!("awqir 1 {text}")).map_err(|e| e.to_string());
        let _ = parse(&format!("awqir 1 region @r (%x: f16[B]) {{ {text}")).map_err(|e| e.to_string());
    }

    #[test]
    fn no_change_of_a_text_makes_the_parser_panic(
        (lists, repeat) in choices(),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0usize..6, any::<prop::sample::Index>()), 1..6),
    ) {
        let module = module(&lists, repeat);
        let mut text: Vec<char> = print(&module).chars().collect();
        for (at, kind, from) in cuts {
            if text.is_empty() {
                break;
            }
            let at = at.index(text.len());
            let other = text[from.index(text.len())];
            match kind {
                0 => text[at] = other,
                1 => text.insert(at, other),
                2 => { text.remove(at); }
                3 => text.truncate(at.max(1)),
                4 => text.splice(at..at, "18446744073709551615".chars()).for_each(drop),
                _ => {
                    let end = (at + 40).min(text.len());
                    let piece: Vec<char> = text[at..end].to_vec();
                    text.extend(piece);
                }
            }
        }
        let text: String = text.into_iter().collect();
        match parse(&text) {
            Ok(module) => {
                let _ = verify(&module).map_err(|e| e.to_string());
                for region in &module.regions {
                    let _ = print_region(&module, region);
                }
                let _ = awqc_ir::text::parse_fragment(&text);
            }
            Err(e) => prop_assert!(e.to_string().contains("line")),
        }
    }
}
