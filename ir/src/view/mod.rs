//! A region seen as a graph, and a module as JSON.
//!
//! [`RegionGraph`] lends a region to petgraph's algorithms: its nodes are the live nodes, an edge leads from the node
//! that defines a value to each node that uses it. Parameters and weights are no nodes of the graph.

mod graph;
mod json;
mod shape;
#[cfg(test)]
mod tests;

use petgraph::algo::is_isomorphic_matching;
use petgraph::dot::Dot;

use crate::region::Region;

pub use graph::{RegionGraph, Vertex, Wires};
pub use json::json;

/// The region in the language of Graphviz: a box for each node, labelled with its line, an edge for each value.
pub fn dot(region: &Region) -> String {
    let graph = RegionGraph::new(region);
    Dot::new(&graph).to_string()
}

/// Whether two regions are the same up to names and the order of independent nodes. Dead nodes count; the names and
/// prefixes of the regions do not, the tensors that they read do.
pub fn isomorphic(a: &Region, b: &Region) -> bool {
    let params = |r: &Region| -> Vec<_> {
        r.params().iter().map(|p| (p.weight().is_some(), r.operand_type(*p).clone())).collect()
    };
    if params(a) != params(b) || shape::results(a) != shape::results(b) {
        return false;
    }
    let (a, b) = (RegionGraph::new(a), RegionGraph::new(b));
    is_isomorphic_matching(&a, &b, |x, y| x.key() == y.key() && x.shape() == y.shape(), |x, y| x.pairs == y.pairs)
}
