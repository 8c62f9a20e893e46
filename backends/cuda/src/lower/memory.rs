//! Memory for values: each has its own from the launch that computes it to the last one that reads it.

use std::collections::BTreeMap;

use super::flat::{FlatProgram, Home, Var};
use super::schedule::{ALIGN, Group};

/// Where values lie.
pub(super) struct Memory {
    pub(super) offsets: Vec<Option<usize>>,
    pub(super) partials: Vec<usize>,
    pub(super) end: usize,
}

impl Memory {
    /// A value lies in its memory from the group that computes it to the last one that reads it. The steps of a group
    /// run for different tokens at different times, so memory changes hands between groups only.
    pub(super) fn of(
        program: &FlatProgram,
        groups: &[Group<'_>],
        partials: &[usize],
        tokens: usize,
        base: usize,
    ) -> Self {
        let mut first: Vec<Option<usize>> = vec![None; program.values.len()];
        let mut last: Vec<usize> = vec![0; program.values.len()];
        for (g, group) in groups.iter().enumerate() {
            let mut use_by = |reads: Vec<Var>, out: Var| {
                let out = program.root(out).0;
                first[out].get_or_insert(g);
                for var in reads.into_iter().map(|r| program.root(r).0).chain([out]) {
                    last[var] = last[var].max(g);
                }
            };
            match group {
                Group::Rows(steps) => steps.iter().for_each(|(op, out)| use_by(op.reads(), *out)),
                Group::One(step) => use_by(step.op.reads(), step.out),
            }
        }
        program.results.iter().for_each(|r| last[program.root(*r).0] = groups.len());
        let mut memory = Self { offsets: vec![None; program.values.len()], partials: vec![0; groups.len()], end: base };
        // Free pieces, by offset.
        let mut free: BTreeMap<usize, usize> = BTreeMap::new();
        for (g, partial) in partials.iter().enumerate() {
            for (var, value) in program.values.iter().enumerate() {
                let size = match value.home {
                    Home::F32 => 4,
                    Home::F16 => 2,
                    Home::View(..) | Home::Cache(_) => continue,
                };
                if first[var] == Some(g) && !program.given.contains(&var) {
                    let bytes = (value.width * value.rows * size * tokens).next_multiple_of(ALIGN);
                    memory.offsets[var] = Some(memory.take(&mut free, bytes));
                }
            }
            let bytes = partial.next_multiple_of(ALIGN);
            memory.partials[g] = memory.take(&mut free, bytes);
            give(&mut free, memory.partials[g], bytes);
            for (var, value) in program.values.iter().enumerate() {
                if let (Some(offset), true) = (memory.offsets[var], last[var] == g) {
                    let size = if value.home == Home::F16 { 2 } else { 4 };
                    let bytes = (value.width * value.rows * size * tokens).next_multiple_of(ALIGN);
                    give(&mut free, offset, bytes);
                }
            }
        }
        memory
    }

    /// The smallest free piece that is large enough, or new memory.
    fn take(&mut self, free: &mut BTreeMap<usize, usize>, bytes: usize) -> usize {
        let best = free.iter().filter(|(_, size)| **size >= bytes).min_by_key(|(_, size)| **size);
        match best.map(|(at, size)| (*at, *size)) {
            Some((at, size)) => {
                free.remove(&at);
                if size > bytes {
                    free.insert(at + bytes, size - bytes);
                }
                at
            }
            None => {
                self.end += bytes;
                self.end - bytes
            }
        }
    }
}

/// Frees a piece; neighbours become one.
fn give(free: &mut BTreeMap<usize, usize>, at: usize, bytes: usize) {
    if bytes == 0 {
        return;
    }
    let (mut at, mut bytes) = (at, bytes);
    if let Some(after) = free.remove(&(at + bytes)) {
        bytes += after;
    }
    if let Some((before, size)) = free.range(..at).next_back().map(|(b, s)| (*b, *s))
        && before + size == at
    {
        free.remove(&before);
        (at, bytes) = (before, size + bytes);
    }
    free.insert(at, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_become_one_piece() {
        let mut memory = Memory { offsets: Vec::new(), partials: Vec::new(), end: 0 };
        let mut free = BTreeMap::new();
        let at: Vec<usize> = [256, 512, 256].iter().map(|b| memory.take(&mut free, *b)).collect();
        assert_eq!((at.as_slice(), memory.end), ([0, 256, 768].as_slice(), 1024));
        give(&mut free, 0, 256);
        give(&mut free, 768, 256);
        give(&mut free, 256, 512);
        assert_eq!(free, BTreeMap::from([(0, 1024)]));
        assert_eq!((memory.take(&mut free, 1024), memory.end), (0, 1024));
    }
}
