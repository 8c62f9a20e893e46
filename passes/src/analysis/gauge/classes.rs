//! Union-find over unknown scales.

/// The class of everything whose scale is 1.
pub(super) const ONE: u32 = 0;

/// A partition of the unknowns; the representative of a class is its smallest member, so ONE represents its own.
pub(super) struct Classes {
    parent: Vec<u32>,
}

impl Classes {
    pub(super) fn new() -> Self {
        Self { parent: vec![ONE] }
    }

    /// `count` new unknowns, each a class of its own; the first one's number, or `None` if there are too many.
    pub(super) fn add(&mut self, count: u64) -> Option<u32> {
        let first = u32::try_from(self.parent.len()).ok()?;
        let end = u32::try_from(u64::from(first).checked_add(count)?).ok()?;
        self.parent.extend(first..end);
        Some(first)
    }

    pub(super) fn find(&mut self, u: u32) -> u32 {
        let mut u = u as usize;
        while self.parent[u] as usize != u {
            // Halving the path keeps later walks short.
            self.parent[u] = self.parent[self.parent[u] as usize];
            u = self.parent[u] as usize;
        }
        u as u32
    }

    pub(super) fn is_one(&mut self, u: u32) -> bool {
        self.find(u) == ONE
    }

    pub(super) fn join(&mut self, a: u32, b: u32) {
        let (a, b) = (self.find(a), self.find(b));
        self.parent[a.max(b) as usize] = a.min(b);
    }
}
