//! petgraph's algorithms on a small region, and comparison up to names.

use petgraph::algo::{dominators::simple_fast, is_cyclic_directed, toposort};
use petgraph::visit::Reversed;

use super::*;
use crate::module::Module;
use crate::text::parse;

const BLOCK: &str = r#"awqir 1
region @b (%x: f16[B,S,4]) {
  $w = "w" : f16[8,4]
  %h = linear %x, $w
  %g, %u = split %h {sizes=[4,4]}
  %s = silu %g
  %m = mul %s, %u
  %q = mul %m, %m
  return %q
}"#;

fn block(text: &str) -> Module {
    parse(text).map_err(|e| e.to_string()).unwrap()
}

#[test]
fn petgraph_runs_on_a_region() {
    let m = block(BLOCK);
    let region = &m.regions[0];
    let graph = RegionGraph::new(region);
    assert_eq!(toposort(&graph, None).unwrap(), region.order());
    assert!(!is_cyclic_directed(&graph));
    let [linear, split, silu, mul, square] = region.order() else { panic!("five nodes were written") };
    // From the end, everything before the product goes through it; the split is reached over two ways.
    let from_end = simple_fast(Reversed(&graph), *square);
    assert_eq!(from_end.immediate_dominator(*silu), Some(*mul));
    assert_eq!(from_end.immediate_dominator(*split), Some(*mul));
    assert_eq!(from_end.immediate_dominator(*linear), Some(*split));
}

#[test]
fn a_value_used_twice_by_a_node_is_one_edge_of_two_wires() {
    use petgraph::visit::{EdgeCount, EdgeRef, IntoEdges};
    let m = block(BLOCK);
    let graph = RegionGraph::new(&m.regions[0]);
    assert_eq!(graph.edge_count(), 5);
    let mul = m.regions[0].order()[3];
    let wires: Vec<_> = (&graph).edges(mul).map(|e| e.weight().pairs.clone()).collect();
    assert_eq!(wires, [vec![(0, 0), (0, 1)]]);
}

#[test]
fn dot_names_lines_and_values() {
    let text = dot(&block(BLOCK).regions[0]);
    assert!(text.starts_with("digraph {"), "{text}");
    assert!(text.contains("%s = silu %g : f16[B,S,4]"), "{text}");
    assert!(text.contains("2 -> 3 [ label = \"%s\" ]"), "{text}");
}

#[test]
fn regions_are_compared_up_to_names_and_order() {
    let same = |a: &str, b: &str| isomorphic(&block(a).regions[0], &block(b).regions[0]);
    let renamed = BLOCK.replace("%s", "%renamed").replace("$w", "$other").replace("@b", "@c");
    assert!(same(BLOCK, &renamed));
    for (from, to) in [
        ("mul %s, %u", "mul %u, %s"),
        ("silu %g", "silu %u"),
        ("silu", "relu"),
        ("\"w\"", "\"v\""),
        ("return %q", "return %m"),
        ("return %q", "return %x"),
        ("return %q", "return %q, %x"),
        ("  %q = ", "  %dead = relu %m\n  %q = "),
        ("B,S,4]) {", "S,B,4]) {"),
    ] {
        let other = BLOCK.replace(from, to);
        assert_ne!(other, BLOCK);
        assert!(!same(BLOCK, &other), "{from} -> {to}");
    }
    let two = |first: &str, second: &str| {
        format!("awqir 1 region @r (%x: f16[B,4]) {{ {first} {second} %y = add %a, %b return %y }}")
    };
    assert!(same(&two("%a = silu %x", "%b = relu %x"), &two("%b = relu %x", "%a = silu %x")));
    assert!(!same(&two("%a = silu %x", "%b = relu %x"), &two("%a = relu %x", "%b = silu %x")));
}

#[test]
fn numbers_of_data_count() {
    let text = "awqir 1 region @r (%x: f16[B,4]) { #s = data \"s\" : f32[4]
        $g = mul.0(\"g\", #s) : f16[4] %y = rms_norm %x, $g {eps=1e-5} return %y }";
    let (a, mut b) = (block(text), block(text));
    assert!(isomorphic(&a.regions[0], &b.regions[0]));
    let id = b.regions[0].data_ids().next().unwrap();
    b.regions[0].set_data_values(id, Some(std::sync::Arc::from([1.0, 2.0, 3.0, 4.0])));
    assert!(!isomorphic(&a.regions[0], &b.regions[0]));
}

#[test]
fn json_holds_what_the_text_holds() {
    let json = json(&block(BLOCK));
    let region = &json["regions"][0];
    assert_eq!(region["nodes"][1]["attributes"]["sizes"], serde_json::json!([4, 4]));
    assert_eq!(region["nodes"][0]["operands"], serde_json::json!(["%x", "$w"]));
    assert_eq!(region["weights"][0], serde_json::json!({"name": "$w", "is": "\"w\"", "type": "f16[8,4]"}));
    assert_eq!(region["results"], serde_json::json!(["%q"]));
    assert_eq!(region["params"][0]["type"], "f16[B,S,4]");
    assert_eq!(json["dims"], serde_json::json!(["B", "S"]));
}
