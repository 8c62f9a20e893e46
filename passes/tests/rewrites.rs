//! Rewrite rules: their text, what they match, the checks under which they are applied, and what they say otherwise.

mod support;

use std::collections::BTreeSet;

use awqc_ir::{Module, text};
use awqc_passes::pass::Budget;
use awqc_passes::rewrite::{Rule, parse_rules, run};
use awqc_passes::{Changed, Facts, PassCx, PassError, RemarkKind, Remarks};

use support::Nothing;

fn rules(text: &str) -> Vec<Rule> {
    parse_rules(text).unwrap_or_else(|e| panic!("{e}"))
}

fn module(body: &str) -> Module {
    let text = format!(
        "awqir 1\nmodel \"test\" {{dtype=f32}}\ndim B, S\n\
         region @r (%x: f32[B,S,8], %y: f32[B,S,8], %p: f32[S,8]) {{\n{body}\n}}\n"
    );
    text::parse(&text).unwrap_or_else(|e| panic!("{e}"))
}

struct Outcome {
    result: Result<Changed, PassError>,
    lines: Vec<String>,
    remarks: Remarks,
    module: Module,
}

fn apply_within(rule: &str, body: &str, mut budget: Budget) -> Outcome {
    let mut module = module(body);
    let (mut facts, mut remarks) = (Facts::default(), Remarks::default());
    let mut cx = PassCx {
        exec: &mut Nothing,
        fused: &mut module.fused,
        facts: &mut facts,
        remarks: &mut remarks,
        scheme: None,
        widths: None,
        shared: &BTreeSet::new(),
        last: false,
        budget: &mut budget,
    };
    let result = run(&rules(rule), &mut module.regions[0], &mut cx);
    module.regions[0].compact();
    awqc_ir::verify(&module).unwrap_or_else(|e| panic!("{e}"));
    let text = text::print_region(&module, &module.regions[0]);
    let plain = |l: &str| l.split(" : ").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let lines = text.lines().skip(1).map(plain).filter(|l| !l.is_empty() && l != "}").collect();
    Outcome { result, lines, remarks, module }
}

fn apply(rule: &str, body: &str) -> Outcome {
    apply_within(rule, body, Budget::default())
}

fn missed(outcome: &Outcome) -> Vec<&str> {
    outcome.remarks.list.iter().filter(|r| r.kind == RemarkKind::Missed).map(|r| r.message.as_str()).collect()
}

const GATE: &str = r#"rewrite "gate" {
  match   { %s = silu %g
            %m = mul %s, %u }
  produce { %m = fused @gate(%g, %u) }
}"#;

#[test]
fn products_match_both_ways() {
    for product in ["mul %s, %y", "mul %y, %s"] {
        let done = apply(GATE, &format!("%s = silu %x\n%m = {product}\nreturn %m"));
        assert_eq!(done.lines, ["%m = fused @gate(%x, %y)", "return %m"]);
        assert_eq!(done.remarks.stats.values().sum::<f64>(), 1.0);
    }
}

#[test]
fn the_search_goes_back_when_a_first_choice_fails() {
    // Both sides are sums; only the right one has a relu below it, and only its left operand is one.
    let rule = r#"rewrite "deep" {
      match   { %r = relu %a
                %s = add %r, %b
                %m = mul %s, %c }
      produce { %m = fused @deep(%a, %b, %c) }
    }"#;
    let done = apply(rule, "%1 = add %x, %y\n%2 = relu %x\n%3 = add %y, %2\n%m = mul %1, %3\nreturn %m");
    assert_eq!(done.lines, ["%1 = add %x, %y", "%m = fused @deep(%x, %y, %1)", "return %m"]);
}

#[test]
fn one_name_is_one_value() {
    let square = r#"rewrite "square" {
      match   { %r = relu %x
                %y = mul %r, %r }
      produce { %y = fused @square(%x) }
    }"#;
    assert_eq!(apply(square, "%r = relu %x\n%z = mul %r, %r\nreturn %z").lines[0], "%z = fused @square(%x)");
    let other = apply(square, "%r = relu %x\n%z = mul %r, %y\nreturn %z");
    assert_eq!(other.result.unwrap(), Changed::No);
}

#[test]
fn written_attributes_must_be_equal() {
    let rule = |by: &str| format!("rewrite \"r\" {{ match {{ %y = scale %x {{by={by}}} }} produce {{ %y = %x }} }}");
    let body = "%s = scale %x {by=2.0}\n%t = silu %s\nreturn %t";
    assert_eq!(apply(&rule("2"), body).lines, ["%t = silu %x", "return %t"]);
    assert_eq!(apply(&rule("3"), body).result.unwrap(), Changed::No);
    // A default is equal to its absence.
    let erf = r#"rewrite "r" { match { %y = gelu %x {form=erf} } produce { %y = relu %x } }"#;
    assert_eq!(apply(erf, "%g = gelu %x\nreturn %g").lines[0], "%g = relu %x");
    assert_eq!(apply(erf, "%g = gelu %x {form=tanh}\nreturn %g").lines[0], "%g = gelu %x {form=tanh}");
}

#[test]
fn optional_weights() {
    let rule = r#"rewrite "norm" {
      match   { %h = layer_norm %x, $g?, $b?
                %r = relu %h }
      produce { %r = fused @norm_relu(%x, $g?, $b?) }
    }"#;
    let body = "$g = \"g\" : f32[8]\n$b = \"b\" : f32[8]\n%h = layer_norm %x{} {eps=1e-5}\n%r = relu %h\nreturn %r";
    for (given, call) in [("", "(%x)"), (", $g", "(%x, $g)"), (", $g, $b", "(%x, $g, $b)")] {
        let done = apply(rule, &body.replace("%x{}", &format!("%x{given}")));
        assert_eq!(done.lines[done.lines.len() - 2], format!("%r = fused @norm_relu{call}"));
    }
}

#[test]
fn lines_that_the_results_do_not_need_are_context() {
    let rule = r#"rewrite "before_relu" {
      match   { %s = silu %x
                %r = relu %s }
      produce { %s = fused @silu_before_relu(%x) }
    }"#;
    let done = apply(rule, "%a = silu %x\n%b = silu %y\n%c = relu %a\n%d = add %c, %b\nreturn %d");
    let want = ["%a = fused @silu_before_relu(%x)", "%b = silu %y", "%c = relu %a", "%d = add %c, %b", "return %d"];
    assert_eq!(done.lines, want);
}

#[test]
fn outlining_is_refused_unless_contained_and_convex() {
    // The activated gate is used again.
    let done = apply(GATE, "%s = silu %x\n%m = mul %s, %y\n%z = add %m, %s\nreturn %z");
    assert_eq!(missed(&done), ["gate at %m: %s is also used outside of the fused nodes (not contained)"]);
    assert!(done.module.fused.is_empty(), "a refused outline leaves no definition behind");
    // It is returned.
    let done = apply(GATE, "%s = silu %x\n%m = mul %s, %y\nreturn %m, %s");
    assert_eq!(done.result.unwrap(), Changed::No);
    // A value lies between: it needs one result and is needed for the other.
    let rule = r#"rewrite "pair" {
      match   { %a = relu %x
                %b = mul %a, %u }
      produce { %a, %b = fused @pair(%x, %u) }
    }"#;
    let done = apply(rule, "%a = relu %x\n%t = silu %a\n%b = mul %a, %t\nreturn %b");
    assert_eq!(missed(&done), ["pair at %b: %t depends on the fused nodes and is needed by them (not convex)"]);
    // With the other operand from elsewhere it is fine, also where a use stands in between.
    let done = apply(rule, "%a = relu %x\n%t = silu %a\n%b = mul %a, %y\n%c = add %b, %t\nreturn %c");
    let want = ["%a, %b = fused @pair(%x, %y)", "%t = silu %a", "%c = add %b, %t", "return %c"];
    assert_eq!(done.lines, want);
}

#[test]
fn instances_of_other_types_get_a_suffix() {
    let first = apply(GATE, "%s = silu %x\n%m = mul %s, %y\n%t = silu %m\n%n = mul %t, %x\nreturn %n");
    assert_eq!(first.module.fused.len(), 1);
    assert_eq!(first.lines, ["%m = fused @gate(%x, %y)", "%n = fused @gate(%m, %x)", "return %n"]);
    let half = apply(
        GATE,
        "%a, %b = split %x {sizes=[4,4]}\n%s = silu %a\n%m = mul %s, %b\n%t = silu %x\n%n = mul %t, %y\nreturn %m, %n",
    );
    let names: Vec<&str> = half.module.fused.iter().map(|d| &*d.name).collect();
    assert_eq!(names, ["gate", "gate.1"]);
    assert_eq!(half.module.fused[1].kernel(), "gate");
}

#[test]
fn guards() {
    let rule = r#"rewrite "sum" {
      match   { %s = add %a, %b
                %r = relu %s }
      where   same_type(%a, %b), single_use(%s)
      produce { %r = fused @sum(%a, %b) }
    }"#;
    assert_eq!(apply(rule, "%s = add %x, %y\n%r = relu %s\nreturn %r").result.unwrap(), Changed::Yes);
    let done = apply(rule, "%s = add %x, %p\n%r = relu %s\nreturn %r");
    assert_eq!(missed(&done), ["sum at %r: %x is f32[B,S,8] and %p is f32[S,8], they must be equal"]);
    let done = apply(rule, "%s = add %x, %y\n%r = relu %s\nreturn %r, %s");
    assert_eq!(missed(&done), ["sum at %r: %s has 2 uses, it must have one"]);
}

#[test]
fn near_misses_say_what_is_in_the_way() {
    let done = apply(GATE, "%s = relu %x\n%m = mul %s, %y\nreturn %m");
    assert_eq!(missed(&done), ["gate at %m: `%s = silu %g` is needed at %s, this is relu"]);
    let done = apply(GATE, "%m = mul %x, %y\nreturn %m");
    assert_eq!(missed(&done), ["gate at %m: `%s = silu %g` is needed, but %x is a parameter"]);
    // An op that has nothing to do with the rule is not worth a word.
    assert!(missed(&apply(GATE, "%m = relu %x\nreturn %m")).is_empty());
}

#[test]
fn new_ops_take_the_place_of_the_root() {
    let rule = r#"rewrite "distribute" {
      match   { %s = add %a, %b
                %y = relu %s }
      produce { %c = relu %a
                %d = silu %b
                %y = add %c, %d }
    }"#;
    let done = apply(rule, "%s = add %x, %y\n%r = relu %s\n%z = mul %r, %x\nreturn %z");
    let want = ["%c = relu %x", "%d = silu %y", "%r = add %c, %d", "%z = mul %r, %x", "return %z"];
    assert_eq!(done.lines, want);
}

#[test]
fn a_replacement_of_another_type_is_refused() {
    let rule = r#"rewrite "wrong" { match { %s = add %a, %b } produce { %s = %b } }"#;
    let done = apply(rule, "%s = add %x, %p\n%r = relu %s\nreturn %r");
    assert_eq!(done.result.as_ref().unwrap(), &Changed::No);
    assert_eq!(missed(&done), ["wrong at %s: %s is f32[B,S,8], its replacement would be f32[S,8]"]);
    assert_eq!(done.lines, ["%s = add %x, %p", "%r = relu %s", "return %r"]);
}

#[test]
fn rewrites_that_never_end_are_stopped() {
    let rule = r#"rewrite "turn" { match { %s = add %a, %b } where same_type(%a, %b) produce { %s = add %b, %a } }"#;
    let done = apply(rule, "%s = add %x, %y\nreturn %s");
    assert!(done.result.unwrap_err().to_string().contains("undo each other"));
}

#[test]
fn the_budget_is_kept() {
    let body = "%s = silu %x\n%m = mul %s, %y\n%t = silu %m\n%n = mul %t, %x\nreturn %n";
    let done = apply_within(GATE, body, Budget::of(1));
    assert_eq!(done.lines, ["%m = fused @gate(%x, %y)", "%t = silu %m", "%n = mul %t, %x", "return %n"]);
    assert_eq!(missed(&done), ["gate at %n: the number of rewrites is limited"]);
    assert_eq!(apply_within(GATE, body, Budget::of(0)).result.unwrap(), Changed::No);
}

#[test]
fn rules_that_do_not_hold_together() {
    let error = |text: &str| parse_rules(text).unwrap_err().to_string();
    let rule = |m: &str, w: &str, p: &str| format!("rewrite \"r\" {{ match {{ {m} }} {w} produce {{ {p} }} }}");
    for (m, w, p, want) in [
        ("%a = silu %x\n%b = relu %y", "", "%b = %y", "`%a = silu %x` shares no value"),
        ("%a = silu %x\n%a = relu %x", "", "%a = %x", "%a is defined twice"),
        ("%a = silu %x", "", "%b = relu %x", "defines none of the matched results"),
        ("%a = silu %x", "", "%a = relu %q", "%q does not occur in `match`"),
        ("%a = silu %x", "", "%a = %q", "%q does not occur in `match`"),
        ("%a = silu %x", "where single_use(%q)", "%a = %x", "%q does not occur in `match`"),
        ("%a = silu %x", "where without(%x, by)", "%a = %x", "%x is not defined in `match`"),
        ("%a = silu %x", "where pretty(%x)", "%a = %x", "there is no guard `pretty`"),
        ("%a = silu %x", "", "%a = fused @f(%x, %q)", "%q is no input"),
        ("%a = mul %x, %y", "", "%a = fused @f(%x)", "the fused op also needs %y"),
        ("%a = silu %x", "", "%b = fused @f(%x)", "%b is not defined in `match`"),
        ("%a = silu %x", "", "%a = fused @f(%x) {n=1}", "a fused op has no attributes"),
        ("%a = silu %x", "", "%a = fused @f(%x)\n%b = relu %a", "one fused op, or other ops"),
        ("%a = fused @f(%x)", "", "%a = %x", "a fused op cannot be matched"),
        ("%a = sliu %x", "", "%a = %x", "`sliu` is not an op"),
        ("%a = silu %x {by=1}", "", "%a = %x", "unknown field `by`"),
        ("%a = silu %x", "", "%a = scale %x", "missing field `by`"),
        ("", "", "%a = %x", "`match` is empty"),
        ("%a = %x", "", "%a = %x", "needs an op"),
    ] {
        let text = rule(m, w, p);
        let got = error(&text);
        assert!(got.contains(want), "{text}\n{got}");
        assert!(got.contains('^'), "{got}");
    }
    assert!(error("rewrite \"a\" { match { %a = silu %x").contains("expected `}`"));
    assert!(error("rewrite a").contains("in quotes"));
    assert!(error("wirte").contains("expected `rewrite`"));
    assert!(error(&format!("{GATE}\n{GATE}")).contains("two rewrites \"gate\""));
}

#[test]
fn errors_show_the_line_as_the_user_wrote_it() {
    let text = "// mine\nrewrite \"r\" {\n  match { %a = silu %x  // é\n    %b = wat %a }\n  produce { %b = %x }\n}\n";
    let got = parse_rules(text).unwrap_err().to_string();
    assert!(got.contains("line 4"), "{got}");
    assert!(got.contains("%b = wat %a }"), "{got}");
    assert!(rules("// only a comment\n").is_empty());
}

mod any_text {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any text gives rules or a diagnosis, and none hangs or panics.
        #[test]
        fn is_answered(parts in prop::collection::vec(prop::sample::select(vec![
            "rewrite", "\"r\"", "{", "}", "match", "where", "produce", "%a", "%b", "$w", "?", "=", "silu", "mul", ",",
            "fused", "@f", "(", ")", "single_use", "\n", "//", "é", "by=1", "\"",
        ]), 0..40)) {
            let text = parts.join(" ");
            if let Err(e) = parse_rules(&text) {
                prop_assert!(!e.is_empty());
            }
        }
    }
}

const SCALES: &str = r#"rewrite "scales" {
  match   { %a = scale %v {by=A}
            %b = scale %a {by=B} }
  where holds(A*B < v.channels)
  produce { %b = scale %v {by=A*B} }
}"#;

#[test]
fn variables_stand_for_attributes_and_can_be_computed_with() {
    let twice =
        |a: &str, b: &str| apply(SCALES, &format!("%s = scale %x {{by={a}}}\n%t = scale %s {{by={b}}}\nreturn %t"));
    let done = twice("2.0", "3.5");
    assert_eq!(done.result.unwrap(), Changed::Yes);
    assert_eq!(done.lines, ["%t = scale %x {by=7.0}", "return %t"]);
    let kept = twice("2.0", "4.0");
    assert_eq!(kept.lines.len(), 3, "{:?}", kept.lines);
    assert!(missed(&kept).iter().any(|m| m.contains("`A*B < v.channels` does not hold")), "{:?}", missed(&kept));
}

#[test]
fn a_variable_is_one_value_and_must_be_matched() {
    let same = SCALES.replace("by=B", "by=A").replace("A*B", "A");
    let done = apply(&same, "%s = scale %x {by=2.0}\n%t = scale %s {by=3.0}\nreturn %t");
    assert_eq!(done.result.unwrap(), Changed::No);
    let unknown = parse_rules(&SCALES.replace("{by=A*B}", "{by=A*C}")).unwrap_err().to_string();
    assert!(unknown.contains("C does not occur in `match`"), "{unknown}");
}

#[test]
fn foreign_ops_take_the_type_of_what_they_replace() {
    let rule = r#"rewrite "quotient" {
      match   { %q = foreign %a, %b {op=Div} }
      produce { %i = foreign %b {op=Reciprocal}
                %q = mul %a, %i }
    }
    rewrite "reciprocal" {
      match   { %i = foreign %b {op=Reciprocal} }
      produce { %i = sigmoid %b }
    }"#;
    let done = apply(rule, "%q = foreign %x, %y {op=Div, results=[\"f32[B,S,8]\"]}\nreturn %q");
    assert_eq!(done.lines, ["%i = sigmoid %y", "%q = mul %x, %i", "return %q"]);
}
