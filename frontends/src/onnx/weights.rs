//! The weights of the region, and the names of their tensors there.

use awqc_ir::{Dim, Name, Type, WeightExpr, WeightId};

use super::import::{Importer, Term, scope};
use super::proto::Node;

impl Importer<'_> {
    /// A weight of the region: the tensor as it is in the file, turned if `turned`.
    fn weight(&mut self, name: String, tensor: String, turned_in_source: bool, turned: bool, term: &Term) -> WeightId {
        let key = (name.clone(), turned, term.plus.to_bits());
        if let Some(id) = self.weights.get(&key) {
            return *id;
        }
        let shape: Vec<usize> = match self.graph.tensors.get(&tensor).map(|t| t.shape.as_slice()) {
            Some([a, b]) if turned_in_source => vec![*b, *a],
            Some([one]) => vec![*one],
            Some(shape) if shape.iter().filter(|d| **d != 1).count() > 1 => shape.to_vec(),
            Some(shape) => vec![shape.iter().product()],
            None => Vec::new(),
        };
        self.named.insert(name.clone(), (tensor, turned_in_source));
        let ty = |s: &[usize]| Type::new(self.elem, s.iter().map(|d| Dim::Const(*d as u64)));
        let label: Name = label(&name).into();
        let own = ty(&shape);
        let reversed = ty(&shape.iter().rev().copied().collect::<Vec<_>>());
        let bare = term.plus == 0.0 && !turned;
        let mut id =
            self.region.add_weight(bare.then(|| label.clone()), WeightExpr::Source(name.as_str().into()), own.clone());
        if turned {
            id = self.region.add_weight(
                (term.plus == 0.0).then(|| label.clone()),
                WeightExpr::Transpose(id),
                reversed.clone(),
            );
        }
        if term.plus != 0.0 {
            let ty = if turned { reversed } else { own };
            id = self.region.add_weight(Some(label), WeightExpr::Offset { of: id, by: term.plus }, ty);
        }
        self.weights.insert(key, id);
        id
    }

    /// A matrix or vector as the graph has it. One that the exporter computed, and numbered, is named after its node.
    pub(super) fn matrix(&mut self, node: &Node, term: &Term) -> WeightId {
        let scope = self.module(node).filter(|_| anonymous(term));
        let name = scope.map(|s| format!("{s}.{}", node.op.to_lowercase())).filter(|n| self.free(n, term));
        self.weight(name.unwrap_or_else(|| term.tensor.clone()), term.tensor.clone(), false, term.transposed, term)
    }

    /// The `[out,in]` matrix of a product with `term`, `[in,out]`. An exporter that stores it under a number has it
    /// named after the module that the node belongs to.
    pub(super) fn linear(&mut self, node: &Node, term: &Term) -> WeightId {
        let scope = self.module(node).filter(|_| anonymous(term) && !term.transposed);
        if let Some(name) = scope.map(|s| format!("{s}.weight")).filter(|n| self.free(n, term)) {
            return self.weight(name, term.tensor.clone(), true, false, term);
        }
        self.weight(term.tensor.clone(), term.tensor.clone(), false, !term.transposed, term)
    }

    /// The module that a node belongs to, under the name that its tensors have: an exporter may leave out the
    /// outermost.
    fn module(&self, node: &Node) -> Option<String> {
        let scope = scope(node)?;
        let mut part = scope.as_str();
        loop {
            let inner = format!(".{part}.");
            if self.graph.tensors.keys().any(|name| name.starts_with(&inner[1..])) {
                return Some(scope);
            }
            let outer = self.graph.tensors.keys().find_map(|name| name.find(&inner).and_then(|at| name.get(..=at)));
            if let Some(outer) = outer {
                return Some(format!("{outer}{scope}"));
            }
            match part.rsplit_once('.') {
                Some((parent, _)) => part = parent,
                None => return Some(scope),
            }
        }
    }

    /// Whether no other tensor has this name.
    fn free(&self, name: &str, term: &Term) -> bool {
        !self.graph.tensors.contains_key(name) && self.named.get(name).is_none_or(|(tensor, _)| *tensor == term.tensor)
    }
}

/// Whether a tensor has a number for a name.
fn anonymous(term: &Term) -> bool {
    term.tensor.contains("::") || !term.tensor.contains('.')
}

/// A name for a weight: the part of the tensor's name that says most.
fn label(tensor: &str) -> String {
    let words: Vec<&str> = tensor.split('.').collect();
    let word = match words.as_slice() {
        [.., module, "weight"] => (*module).to_owned(),
        [.., module, last] => format!("{module}_{last}"),
        _ => "w".to_owned(),
    };
    word.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}
