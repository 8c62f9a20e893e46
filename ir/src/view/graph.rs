//! petgraph's traits for a region.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use petgraph::data::DataMap;
use petgraph::visit::{
    Data, EdgeCount, EdgeRef, GetAdjacencyMatrix, GraphBase, GraphProp, IntoEdgeReferences, IntoEdges,
    IntoEdgesDirected, IntoNeighbors, IntoNeighborsDirected, IntoNodeIdentifiers, IntoNodeReferences,
    NodeCompactIndexable, NodeCount, NodeIndexable, Visitable,
};
use petgraph::{Directed, Direction};

use crate::id::NodeId;
use crate::region::{Def, Region};
use crate::text::line_text;

/// A live node.
#[derive(Clone, Debug, PartialEq)]
pub struct Vertex {
    id: NodeId,
    line: String,
    shape: String,
    key: u64,
}

impl Vertex {
    /// The node.
    pub fn id(&self) -> NodeId {
        self.id
    }

    pub(super) fn shape(&self) -> &str {
        &self.shape
    }

    pub(super) fn key(&self) -> u64 {
        self.key
    }
}

impl fmt::Display for Vertex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

/// All values that lead from one node to another: (result position, operand position), in the order of the operands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wires {
    /// The pairs.
    pub pairs: Vec<(usize, usize)>,
    text: String,
}

impl fmt::Display for Wires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A region as a directed graph. Built once; it does not follow changes of the region.
#[derive(Clone, Debug)]
pub struct RegionGraph {
    vertices: Vec<Vertex>,
    position: BTreeMap<NodeId, usize>,
    edges: Vec<(NodeId, NodeId, Wires)>,
    /// For each position, the edges out of it and into it.
    out: Vec<Vec<usize>>,
    into: Vec<Vec<usize>>,
}

impl RegionGraph {
    /// The graph of `region`.
    pub fn new(region: &Region) -> Self {
        let position: BTreeMap<NodeId, usize> = region.order().iter().enumerate().map(|(i, n)| (*n, i)).collect();
        let shapes = super::shape::nodes(region);
        let lines = line_text(region);
        let vertices: Vec<Vertex> = region
            .order()
            .iter()
            .zip(shapes.into_iter().zip(lines))
            .map(|(id, ((shape, key), line))| Vertex { id: *id, line, shape, key })
            .collect();
        let mut wires: BTreeMap<(usize, usize), Vec<(usize, usize)>> = BTreeMap::new();
        for (to, (_, node)) in region.nodes().enumerate() {
            for (operand, value) in node.operands.iter().enumerate().filter_map(|(i, o)| Some((i, o.value()?))) {
                // A value whose node was removed has no edge; the verifier reports it.
                if let Def::Result(from, result) = region.value(value).def
                    && let Some(from) = position.get(&from)
                {
                    wires.entry((*from, to)).or_default().push((result, operand));
                }
            }
        }
        let (mut out, mut into) = (vec![Vec::new(); vertices.len()], vec![Vec::new(); vertices.len()]);
        let mut edges = Vec::with_capacity(wires.len());
        for ((from, to), pairs) in wires {
            out[from].push(edges.len());
            into[to].push(edges.len());
            let (a, b) = (vertices[from].id, vertices[to].id);
            let names: BTreeSet<&str> = pairs
                .iter()
                .filter_map(|(r, _)| region.node(a).results.get(*r))
                .map(|v| &*region.value(*v).name)
                .collect();
            let text = names.into_iter().map(|n| format!("%{n}")).collect::<Vec<_>>().join(", ");
            edges.push((a, b, Wires { pairs, text }));
        }
        Self { vertices, position, edges, out, into }
    }

    fn at(&self, id: NodeId) -> Option<usize> {
        self.position.get(&id).copied()
    }

    fn incident(&self, id: NodeId, direction: Direction) -> &[usize] {
        let lists = match direction {
            Direction::Outgoing => &self.out,
            Direction::Incoming => &self.into,
        };
        self.at(id).and_then(|i| lists.get(i)).map_or(&[], Vec::as_slice)
    }
}

/// An edge that algorithms pass around.
#[derive(Clone, Copy, Debug)]
pub struct Edge<'g> {
    index: usize,
    ends: (NodeId, NodeId),
    wires: &'g Wires,
}

impl<'g> EdgeRef for Edge<'g> {
    type NodeId = NodeId;
    type EdgeId = usize;
    type Weight = Wires;

    fn source(&self) -> NodeId {
        self.ends.0
    }

    fn target(&self) -> NodeId {
        self.ends.1
    }

    fn weight(&self) -> &Wires {
        self.wires
    }

    fn id(&self) -> usize {
        self.index
    }
}

impl GraphBase for RegionGraph {
    type NodeId = NodeId;
    type EdgeId = usize;
}

impl Data for RegionGraph {
    type NodeWeight = Vertex;
    type EdgeWeight = Wires;
}

impl DataMap for RegionGraph {
    fn node_weight(&self, id: NodeId) -> Option<&Vertex> {
        self.at(id).and_then(|i| self.vertices.get(i))
    }

    fn edge_weight(&self, id: usize) -> Option<&Wires> {
        self.edges.get(id).map(|(_, _, wires)| wires)
    }
}

impl GraphProp for RegionGraph {
    type EdgeType = Directed;
}

impl NodeCount for RegionGraph {
    fn node_count(&self) -> usize {
        self.vertices.len()
    }
}

impl EdgeCount for RegionGraph {
    fn edge_count(&self) -> usize {
        self.edges.len()
    }
}

impl NodeIndexable for RegionGraph {
    fn node_bound(&self) -> usize {
        self.vertices.len()
    }

    fn to_index(&self, id: NodeId) -> usize {
        self.at(id).unwrap_or(self.vertices.len())
    }

    fn from_index(&self, i: usize) -> NodeId {
        self.vertices[i].id
    }
}

impl NodeCompactIndexable for RegionGraph {}

impl Visitable for RegionGraph {
    type Map = HashSet<NodeId>;

    fn visit_map(&self) -> Self::Map {
        HashSet::new()
    }

    fn reset_map(&self, map: &mut Self::Map) {
        map.clear();
    }
}

impl GetAdjacencyMatrix for RegionGraph {
    type AdjMatrix = BTreeSet<(NodeId, NodeId)>;

    fn adjacency_matrix(&self) -> Self::AdjMatrix {
        self.edges.iter().map(|(a, b, _)| (*a, *b)).collect()
    }

    fn is_adjacent(&self, matrix: &Self::AdjMatrix, a: NodeId, b: NodeId) -> bool {
        matrix.contains(&(a, b))
    }
}

type Boxed<'g, T> = Box<dyn Iterator<Item = T> + 'g>;

impl<'g> IntoNeighborsDirected for &'g RegionGraph {
    type NeighborsDirected = Boxed<'g, NodeId>;

    fn neighbors_directed(self, id: NodeId, direction: Direction) -> Self::NeighborsDirected {
        Box::new(self.incident(id, direction).iter().filter_map(move |e| {
            let (from, to, _) = self.edges.get(*e)?;
            Some(match direction {
                Direction::Outgoing => *to,
                Direction::Incoming => *from,
            })
        }))
    }
}

impl<'g> IntoNeighbors for &'g RegionGraph {
    type Neighbors = Boxed<'g, NodeId>;

    fn neighbors(self, id: NodeId) -> Self::Neighbors {
        self.neighbors_directed(id, Direction::Outgoing)
    }
}

impl<'g> IntoNodeIdentifiers for &'g RegionGraph {
    type NodeIdentifiers = Boxed<'g, NodeId>;

    fn node_identifiers(self) -> Self::NodeIdentifiers {
        Box::new(self.vertices.iter().map(|v| v.id))
    }
}

impl<'g> IntoNodeReferences for &'g RegionGraph {
    type NodeRef = (NodeId, &'g Vertex);
    type NodeReferences = Boxed<'g, (NodeId, &'g Vertex)>;

    fn node_references(self) -> Self::NodeReferences {
        Box::new(self.vertices.iter().map(|v| (v.id, v)))
    }
}

impl<'g> IntoEdgeReferences for &'g RegionGraph {
    type EdgeRef = Edge<'g>;
    type EdgeReferences = Boxed<'g, Edge<'g>>;

    fn edge_references(self) -> Self::EdgeReferences {
        Box::new(self.edges.iter().enumerate().map(|(index, (a, b, wires))| Edge { index, ends: (*a, *b), wires }))
    }
}

impl<'g> IntoEdges for &'g RegionGraph {
    type Edges = Boxed<'g, Edge<'g>>;

    fn edges(self, id: NodeId) -> Self::Edges {
        self.edges_directed(id, Direction::Outgoing)
    }
}

impl<'g> IntoEdgesDirected for &'g RegionGraph {
    type EdgesDirected = Boxed<'g, Edge<'g>>;

    fn edges_directed(self, id: NodeId, direction: Direction) -> Self::EdgesDirected {
        Box::new(self.incident(id, direction).iter().filter_map(move |index| {
            let (a, b, wires) = self.edges.get(*index)?;
            Some(Edge { index: *index, ends: (*a, *b), wires })
        }))
    }
}
