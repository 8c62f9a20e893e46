//! The text form on whole modules: what is written reads back, templates expand, wrong texts are refused with a place.

use awqc_ir::{Env, parse, parse_with, print};
use serde_json::{Value as Json, json};

const BLOCK: &str = r#"awqir 1
model "llama" {dtype=f16, hidden=64, layers=3, tied}
dim B, S

fused @swiglu (%gu: f16[B,S,224]) {
  %g, %u = split %gu {sizes=[112,112]} : f16[B,S,112], f16[B,S,112]
  %s     = silu %g                     : f16[B,S,112]
  %m     = mul %s, %u                  : f16[B,S,112]
  return %m
}

region @embed (%ids: i32[B,S], %pos: i32[S]) from "model" {
  $e = "embed_tokens.weight" : f16[100,64]

  %x         = embedding %ids, $e                                                  : f16[B,S,64]
  %cos, %sin = rope_table %pos {dim=16, theta=500000.0, scaling=linear(factor=8.0)} : f32[S,8], f32[S,8]
  return %x, %cos, %sin
}

layer @0..1 (%x: f16[B,S,64], %cos: f32[S,8], %sin: f32[S,8]) from "model.layers.{i}" {
  #s0  = data "attn_in"                                                               : f32[64]
  #s1  = data "attn_out"                                                              : f32[32]
  $ln1 = div.0("input_layernorm.weight", #s0)                                         : f16[64]
  $q   = quant(mul.1("self_attn.q_proj.weight", #s0))                                 : u4g32[64,64]
  $k   = quant(mul.1("self_attn.k_proj.weight", #s0))                                 : u4g32[32,64]
  $v   = quant(div.0(mul.1("self_attn.v_proj.weight", #s0), #s1))                     : u4g32[32,64]
  $o   = pack(quant(mul.1("self_attn.o_proj.weight", tie(#s1, 16, 2))))               : u4g32@rows[64,64]
  $g   = "mlp.gate_proj.weight"                                                       : f16[112,64]
  $u   = "mlp.up_proj.weight"                                                         : f16[112,64]
  $gu  = cat.0($g, $u)                                                                : f16[224,64]
  $d   = transpose("mlp.down_proj.weight")                                            : f16[64,112]

  %h1 = rms_norm %x, $ln1 {eps=1e-5}                    : f16[B,S,64]
  %q  = linear %h1, $q                                  : f16[B,S,64]
  %k  = linear %h1, $k                                  : f16[B,S,32]
  %v  = linear %h1, $v                                  : f16[B,S,32]
  %qr = rope %q, %cos, %sin {heads=4}                   : f16[B,S,64]
  %kr = rope %k, %cos, %sin {heads=2}                   : f16[B,S,32]
  %a  = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2} : f16[B,S,64]
  %o  = linear %a, $o                                   : f16[B,S,64]
  %r1 = add %x, %o                                      : f16[B,S,64]
  %gu = linear %r1, $gu                                 : f16[B,S,224]
  %m  = fused @swiglu(%gu)                              : f16[B,S,112]
  %d  = linear %m, $d                                   : f16[B,S,64]
  %r2 = add %r1, %d                                     : f16[B,S,64]
  return %r2
}

layer @2 (%x: f16[B,S,64]) from "model.layers.2" {
  %y = gelu %x {form=tanh} : f16[B,S,64]
  return %y
}
"#;

/// Columns are white space: two texts are compared without it.
fn squeezed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_module_reads_back() {
    let module = parse(BLOCK).map_err(|e| e.to_string()).unwrap();
    assert_eq!(module.layers(), 3);
    let printed = print(&module);
    assert_eq!(squeezed(&printed), squeezed(BLOCK));
    assert_eq!(print(&parse(&printed).unwrap()), printed);
}

/// A configuration and the tensors that there are.
struct Checkpoint {
    config: Json,
    tensors: Vec<&'static str>,
}

impl Env for Checkpoint {
    fn lookup(&self, path: &str) -> Option<Json> {
        let mut keys = path.strip_prefix("config.")?.split('.');
        let first = self.config.get(keys.next()?)?;
        keys.try_fold(first, |v, k| v.get(k)).cloned()
    }

    fn tensor(&self, name: &str) -> bool {
        self.tensors.contains(&name)
    }
}

/// The printed form of a template, with its types and columns taken out.
fn expand(template: &str, config: Json, tensors: &[&'static str]) -> Result<String, String> {
    let env = Checkpoint { config, tensors: tensors.to_vec() };
    let module = parse_with(&format!("awqir 1\n{template}"), &env).map_err(|e| e.to_string())?;
    Ok(squeezed(&print(&module)))
}

/// The attributes that an expression in the header comes to.
fn value(expression: &str) -> Result<Json, String> {
    let config =
        json!({"heads": 8, "hidden": 64, "nothing": null, "types": ["full", "window"], "rope": {"factor": 2.5}});
    let env = Checkpoint { config, tensors: Vec::new() };
    let text = format!("awqir 1 let heads = config.heads, list = config.types model \"m\" {{v=({expression})}}");
    parse_with(&text, &env).map(|m| m.header.get("v").cloned().unwrap_or(Json::Null)).map_err(|e| e.to_string())
}

#[test]
fn expressions_have_these_values() {
    for (expression, want) in [
        ("config.hidden / heads", json!(8)),
        ("1 + 2 * 3 - 4", json!(3)),
        ("(1 + 2) * 3", json!(9)),
        ("7 % 4", json!(3)),
        ("-2", json!(-2)),
        ("2.0 / 4", json!(0.5)),
        ("sqrt(heads * 2)", json!(4.0)),
        ("int(sqrt(16))", json!(4)),
        ("min(3, 1, 2)", json!(1)),
        ("max(3, 1.5)", json!(3)),
        ("len(list)", json!(2)),
        ("config.missing ?? config.nothing ?? 5", json!(5)),
        ("config.missing ?? heads * 2", json!(16)),
        ("config.rope.factor", json!(2.5)),
        ("config.rope.nothing == none", json!(true)),
        ("list[1]", json!("window")),
        ("config.types[0] == \"full\"", json!(true)),
        ("config.missing[0]", Json::Null),
        ("1 == 1.0 and 1 < 2 and not 2 <= 1", json!(true)),
        ("false or 3 != 3", json!(false)),
        ("if heads > 4 then \"many\" else \"few\"", json!("many")),
        // The branch that is not taken is not computed.
        ("if true then 1 else 1 / 0", json!(1)),
        ("true or 1 / 0 == 1", json!(true)),
        ("\"{heads}x{config.hidden}\"", json!("8x64")),
        ("[1, heads, \"a\"]", json!([1, 8, "a"])),
        ("bands(factor=config.rope.factor, flag)", json!({"bands": {"factor": 2.5, "flag": true}})),
        ("list[heads - 7]", json!("window")),
    ] {
        assert_eq!(value(expression).map_err(|e| format!("{expression}: {e}")).unwrap(), want, "{expression}");
    }
}

#[test]
fn wrong_expressions_say_what_is_wrong() {
    for (expression, what) in [
        ("heads / 3", "leaves a remainder"),
        ("heads / 0", "divided by 0"),
        ("heeds * 2", "`heeds` is not a name that is known here"),
        ("list[2]", "entry 2 of a list of 2"),
        ("1 + \"a\"", "a number is needed here, this is \"a\""),
        ("not 3", "true or false is needed here, this is 3"),
        ("9223372036854775807 * 9223372036854775807 * 9223372036854775807", "too large"),
        ("len(3)", "len of 3"),
        ("int(2.5)", "does not take these values"),
        ("if true then 1", "`else` is expected here"),
        ("\"{nobody}\"", "`nobody` is not a name"),
        ("ln(0)", "too large, or no number"),
    ] {
        let error = value(expression).unwrap_err();
        assert!(error.contains(what), "{expression}: {error}");
    }
}

#[test]
fn layers_expand_with_their_number_and_their_names() {
    let template = r#"
        let n = config.layers
        layer @0..n-1 (%x: T[B,4]) from "m.{i}" when i % 2 == 0 { let k = i + 1 %y = scale %x {by=k} return %y }
        layer @0..n-1 (%x: T[B,4]) from "m.{i}" when i % 2 == 1 { %y = silu %x return %y }"#;
    let text = expand(template, json!({"layers": 5}), &[]).unwrap();
    let order: Vec<&str> = text.match_indices("layer ").map(|(at, _)| &text[at + 6..at + 8]).collect();
    assert_eq!(order, ["@0", "@1", "@2", "@3", "@4"]);
    assert!(text.contains("from \"m.4\" { %y = scale %x {by=5.0} : f16[B,4]"), "{text}");
    assert_eq!(expand(template, json!({"layers": 0}), &[]).unwrap().matches("layer").count(), 0);
    let wrong = "layer @0..2 (%x: T[B,4]) { require i < 2, \"layer {i} is one too many\" return %x }";
    let error = expand(wrong, json!({}), &[]).unwrap_err();
    assert!(error.contains("layer 2 is one too many") && error.contains("in layer @2"), "{error}");
}

#[test]
fn the_first_layer_of_a_range_may_be_a_name() {
    let template = r#"let k = config.k
        layer @0..k-1 (%x: T[B,4]) { %y = relu %x return %y }
        layer @k..3 (%x: T[B,4]) { %y = silu %x return %y }"#;
    let text = expand(template, json!({"k": 1}), &[]).unwrap();
    assert!(text.contains("layer @0 (") && text.contains("layer @1..3 ("), "{text}");
}

#[test]
fn regions_with_numbers_expand_and_print_as_ranges() {
    let template = r#"dim B, S, N
    region @eye (%p: T[N,3,8,8]) { %x = patches %p {size=4} return %x }
    region @eye.0..config.depth-1 (%x: T[N,4,48]) from "eye.{i}" {
      $w = "w" : T[48,48]
      %y = linear %x, $w
      return %y
    }
    region @none.0..-1 (%x: T[N,4,48]) { return %x }
    region @embed (%x: T[N,4,48], %ids: i32[B,S]) {
      $e = "e" : T[10,48]
      %t = embedding %ids, $e
      %y = place %t, %ids, %x {token=7}
      return %y
    }"#;
    let text = expand(template, json!({"depth": 3}), &[]).unwrap();
    assert!(text.contains("region @eye.0..2 (%x: f16[N,4,48]) from \"eye.{i}\" {"), "{text}");
    assert!(!text.contains("none"), "{text}");
    let module = parse(&text).unwrap();
    let printed = print(&module);
    assert_eq!(print(&parse(&printed).unwrap()), printed);
    assert_eq!(module.regions[3].tensor_name("w"), "eye.2.w");
    awqc_ir::verify(&module).unwrap();
    let images = module.images().unwrap();
    assert_eq!((module.eye(), images.channels, images.height, images.width), (4, 3, 8, 8));
    assert_eq!((images.token, images.tokens), (Some(7), 4));

    let mut other = module.clone();
    other.regions[4].name = awqc_ir::RegionName::Named("eye.9".into());
    let text = print(&other);
    assert_eq!(print(&parse(&text).unwrap()), text);
    let e = parse("awqir 1 region @eye..2 (%x: f16[4]) { return %x }").unwrap_err().to_string();
    assert!(e.contains("a range begins with a number"), "{e}");
    let e = parse("awqir 1 region @eye.0..99999 (%x: f16[4]) { return %x }").unwrap_err().to_string();
    assert!(e.contains("at most"), "{e}");
    let e = parse("awqir 1 region @eye.1..2 (%x: f16[4]) { return %x } region @eye.2 (%x: f16[4]) { return %x }")
        .unwrap_err()
        .to_string();
    assert!(e.contains("@eye.2 is defined already"), "{e}");
}

#[test]
fn optional_tensors_and_alternatives() {
    let template = r#"region @r (%x: T[B,4]) from "p" {
        $w = "w" or "v"  : T[4,4]
        $b = "b"?        : T[4]
        $n = "n"?        : T[4]
        $h = rows($n, 0, 4)
        %y = linear %x, $w, $b
        opt %z = rms_norm %y, $n {eps=1e-5}
        opt %q = rms_norm %z, $h {eps=1e-5}
        %o = silu %q
        return %o }"#;
    let none = expand(template, json!({}), &["p.v"]).unwrap();
    assert!(none.contains("$w = \"v\" : f16[4,4] %y = linear %x, $w : f16[B,4] %o = silu %y"), "{none}");
    let all = expand(template, json!({}), &["p.w", "p.v", "p.b", "p.n"]).unwrap();
    assert!(all.contains("$w = \"w\"") && all.contains("linear %x, $w, $b"), "{all}");
    assert!(all.contains("%q = rms_norm %z, $h {eps=1e-5} : f16[B,4] %o = silu %q"), "{all}");
    // What is not optional for its op must be there.
    let needed = template.replace("\"w\" or \"v\"", "\"w\" or \"v\"?");
    assert!(expand(&needed, json!({}), &[]).unwrap_err().contains("the checkpoint has no `p.w`, which linear needs"));
}

#[test]
fn choices_are_made_when_reading() {
    let template = r#"
        require config.act == "a" or config.act == "b", "the activation {config.act} is not known"
        let act = if config.act == "a" then "silu" else "gelu {form=tanh}"
        region @r (%x: T[B,4]) when config.there {
          $a = if config.turned then transpose("w") else "w" : T[4,6]
          $t = transpose($a)
          %n = softcap %x {at=2.0}
          %m = relu %n
          %y = if config.norm then %m else %x
          %z = linear %y, $t
          %s = (act) %z
          return %s }"#;
    let text = expand(template, json!({"act": "b", "there": true, "turned": true}), &[]).unwrap();
    assert!(!text.contains("softcap") && !text.contains("relu"), "{text}");
    assert!(text.contains("$a = transpose(\"w\") : f16[4,6]") && text.contains("gelu %z {form=tanh}"), "{text}");
    let text = expand(template, json!({"act": "a", "there": true, "norm": true}), &[]).unwrap();
    assert!(text.contains("%m = relu %n") && text.contains("$a = \"w\"") && text.contains("silu %z"), "{text}");
    assert!(!expand(template, json!({"act": "a"}), &[]).unwrap().contains("region"));
    assert!(expand(template, json!({"act": "c"}), &[]).unwrap_err().contains("the activation c is not known"));
}

#[test]
fn attributes_that_are_none_or_false_are_left_out() {
    let template = r#"region @r (%q: T[B,S,8]) {
        %a = sdpa %q, %q, %q {causal=config.causal, heads=2, kv_heads=2, window=config.window, scale=config.scale}
        return %a }"#;
    let text = expand(template, json!({"causal": false, "window": 3}), &[]).unwrap();
    assert!(text.contains("sdpa %q, %q, %q {heads=2, kv_heads=2, window=3} :"), "{text}");
}

#[test]
fn dtype_is_what_t_means() {
    let text =
        expand("model \"m\" {dtype=bf16} region @r (%x: T[B,4]) { %y = silu %x return %y }", json!({}), &[]).unwrap();
    assert!(text.contains("bf16[B,4]"), "{text}");
    assert!(expand("model \"m\" {dtype=i32}", json!({}), &[]).unwrap_err().contains("dtype is f16, bf16 or f32"));
}

/// Texts with a mistake, the line of the mistake, its code, and part of the message.
#[test]
fn mistakes_are_found_at_their_place() {
    let region = |body: &str| format!("awqir 1\nregion @r (%x: f16[B,S,4]) {{\n{body}\n}}\n");
    for (body, line, code, what) in [
        ("return %q", 3, "P02", "%q is not defined here"),
        ("%y = silu %x\nreturn %y, %x %z", 4, "P01", "`}` is expected here, not `%z`"),
        ("%y = sulu %x\nreturn %y", 3, "P02", "`sulu` is not an op"),
        ("%y = scale %x\nreturn %y", 3, "P03", "missing field `by`"),
        ("%y = scale %x {by=1.0, at=2}\nreturn %y", 3, "P03", "unknown field `at`"),
        ("%y = scale %x {by=two}\nreturn %y", 3, "P03", "`two` has no value here"),
        ("%y = silu %x : f16[B,S,5]\nreturn %y", 3, "P03", "is f16[B,S,4], f16[B,S,5] is written"),
        ("%y, %z = silu %x\nreturn %y", 3, "P03", "1 results, 2 names"),
        ("%x = silu %x\nreturn %x", 3, "P02", "%x is defined already"),
        ("%y = silu $w\nreturn %y", 3, "P02", "$w is not defined here"),
        ("$w = \"w\"\n%y = silu %x\nreturn %y", 3, "P03", "give it a line of its own"),
        ("$w = quant(cat.0(\"a\", \"b\")) : u4g2[8,4]\nreturn %x", 3, "P03", "give it a line of its own"),
        ("$w = mul.0(\"w\", #s) : f16[4]\nreturn %x", 3, "P02", "#s is not defined here"),
        ("#s = data \"s\" : f32[3]\n$w = mul.0(\"w\", #s) : f16[4]\nreturn %x", 4, "P03", "3 factors for axis 0"),
        ("#s = data \"s\" : f16[3]\nreturn %x", 3, "P03", "data has a type such as f32[4096]"),
        ("$w = \"w\" : f16[4,Q]\nreturn %x", 3, "P02", "`Q` is not a name"),
        ("$w = \"w\" : u5g2[4,4]\nreturn %x", 3, "P03", "5 bits are not supported"),
        ("$w = \"w\" : f16@nowhere[4,4]\nreturn %x", 3, "P03", "`nowhere` is not a layout"),
        ("%y = fused @none(%x)\nreturn %y", 3, "P03", "fused @none is not defined"),
        ("%y = silu %x {form=tanh}\nreturn %y", 3, "P03", "unknown field `form`"),
        ("let i = 1\nreturn %x", 3, "P02", "`i` is a word of the language"),
        ("let a = 1\nlet a = 2\nreturn %x", 4, "P02", "`a` has a value already"),
        ("%y = silu %x", 4, "P01", "a definition or `return` is expected here, not `}`"),
        ("$w = \"w\" : f16[4,9999999999]\nreturn %x", 3, "P05", "an axis of 9999999999"),
    ] {
        let error = parse(&region(body)).unwrap_err();
        let first = &error.0[0];
        assert!(first.message.contains(what) || first.notes.iter().any(|n| n.contains(what)), "{body}: {error}");
        assert_eq!((first.code, first.line()), (code, Some(line)), "{body}: {error}");
    }
    for (text, what) in [
        ("", "`awqir` is expected here, not the end of the text"),
        ("awqir 2", "version 2 of the language is not known"),
        (
            "awqir 1 region @r (%x: f16[B]) { return %x } region @r (%x: f16[B]) { return %x }",
            "region @r is defined already",
        ),
        (
            "awqir 1 layer @1..2 (%x: f16[B]) { return %x } layer @2 (%x: f16[B]) { return %x }",
            "layer @2 is defined twice",
        ),
        ("awqir 1 layer @0..99999 (%x: f16[B]) { return %x }", "at most 10000 layers"),
        ("awqir 1 dim B, B", "the dimension B is declared twice"),
        ("awqir 1 layer @0..-1 (%x: f16[B]) { return", "`}` is missing"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

#[test]
fn texts_that_grow_without_end_are_refused() {
    let nested = format!("awqir 1 let a = {}1{}", "(".repeat(100_000), ")".repeat(100_000));
    let chain = format!("awqir 1 let a = 1{}", " + 1".repeat(100_000));
    let negated = format!("awqir 1 let a = {}1", "-".repeat(100_000));
    let lists = format!("awqir 1 let a = {}", "[".repeat(100_000));
    let terms = format!("awqir 1 region @r (%x: f16[B]) {{ $w = {}", "quant(".repeat(100_000));
    let mut laughs = "awqir 1 let a0 = [1,1,1,1,1,1,1,1]\n".to_owned();
    let mut strings = "awqir 1 let a0 = \"lollollollollollol\"\n".to_owned();
    let mut deep = "awqir 1 region @r (%x: f16[B]) { $a0 = \"w\" : f16[4]\n".to_owned();
    let mut lists_of_lists = "awqir 1 let a0 = 1\n".to_owned();
    for i in 1..300 {
        let a = format!("a{}", i - 1);
        laughs += &format!("let a{i} = [{a},{a},{a},{a},{a},{a},{a},{a}]\n");
        strings += &format!("let a{i} = \"{{{a}}}{{{a}}}{{{a}}}{{{a}}}\"\n");
        deep += &format!("$a{i} = offset(${a}, 1.0) : f16[4]\n");
        lists_of_lists += &format!("let a{i} = [{a}]\n");
    }
    let body = "%a = silu %x\n".replace("%a", "%value_with_a_long_name_for_a_line_that_is_long");
    let layers = format!(
        "awqir 1 layer @0..9999 (%x: f16[B]) {{ {} return %x }}",
        (0..500).map(|i| body.replacen("line", &format!("l{i}"), 1)).collect::<String>()
    );
    for text in [nested, chain, negated, lists, terms, laughs, strings, deep, lists_of_lists, layers] {
        assert_eq!(parse(&text).unwrap_err().codes(), ["P05"], "{}", &text[..60]);
    }
}

#[test]
fn names_are_made_legal_and_different() {
    use awqc_ir::{Elem, Module, Operand, Region, RegionName, Type, op::Silu};
    let mut region = Region::new(RegionName::Named("r".into()), "");
    let x = region.add_param("a b", Type::new(Elem::F16, [4.into()]));
    let n = region.append(Silu {}.into(), vec![Operand::Value(x)], &["a_b"], &[]).unwrap();
    let y = region.node(n).results[0];
    region.set_results(vec![y]);
    let mut module = Module::new("a \"quoted\" {name}", Elem::F16);
    module.header.insert("a key".into(), json!([1.0, "i", {"x": {}}]));
    module.regions.push(region);
    let text = print(&module);
    assert!(text.contains("(%a_b: f16[4]) {\n  %a_b.1 = silu %a_b : f16[4]"), "{text}");
    let again = parse(&text).map_err(|e| e.to_string()).unwrap();
    assert_eq!((&again.name, &again.header), (&module.name, &module.header));
    assert_eq!(print(&again), text);
}

#[test]
fn terms_print_inside_others_only_where_their_type_follows() {
    use awqc_ir::{Data, DataMap, DataRef, Elem, Module, Operand, Region, RegionName, Type, WeightExpr, op::Linear};
    let mut region = Region::new(RegionName::Layer(0), "");
    let x = region.add_param("x", Type::new(Elem::F16, [4.into()]));
    let ty = |elem, rows: u64| Type::new(elem, [rows.into(), 4.into()]);
    let source = |r: &mut Region, name: &str, elem| r.add_weight(None, WeightExpr::Source(name.into()), ty(elem, 3));
    let s = region.add_data(Data { name: "s".into(), label: "l".into(), shape: vec![4], values: None });
    let by = DataRef { id: s, map: DataMap::Whole };
    // Below `quant` a tensor has the model's type: this one does, that one does not.
    let (a, b) = (source(&mut region, "a", Elem::F16), source(&mut region, "b", Elem::F32));
    let a = region.add_weight(None, WeightExpr::Mul { axis: 1, of: a, by }, ty(Elem::F16, 3));
    let b = region.add_weight(None, WeightExpr::Mul { axis: 1, of: b, by }, ty(Elem::F32, 3));
    let quant = Elem::Quant("u4g2".parse().unwrap());
    let a = region.add_weight(None, WeightExpr::Quant(a), ty(quant, 3));
    let b = region.add_weight(None, WeightExpr::Quant(b), ty(quant, 3));
    let both = region.add_weight(Some("both".into()), WeightExpr::Cat { axis: 0, parts: vec![a, b] }, ty(quant, 6));
    let n = region.append(Linear {}.into(), vec![Operand::Value(x), Operand::Weight(both)], &["y"], &[]).unwrap();
    region.set_results(region.node(n).results.clone());
    let mut module = Module::new("m", Elem::F16);
    module.regions.push(region);
    let text = print(&module);
    // Below `cat` no shape follows, so the tensor has a line of its own; below `quant` the other type would be lost.
    let want = "#s = data \"l\" : f32[4] $w = \"a\" : f16[3,4] $w.1 = mul.1(\"b\", #s) : f32[3,4] \
                $both = cat.0(quant(mul.1($w, #s)), quant($w.1)) : u4g2[6,4]";
    assert!(squeezed(&text).contains(want), "{text}");
    let again = parse(&text).map_err(|e| e.to_string()).unwrap();
    assert_eq!(print(&again), text);
    assert!(awqc_ir::view::isomorphic(&module.regions[0], &again.regions[0]));
}
