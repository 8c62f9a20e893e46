//! The stages of mixtures of experts: the choice's route, the rows of each expert, the products with its matrix.

use awqc_ir::panels::PANEL_ROWS;

use super::{Part, Scratch, Work, read, write};
use crate::arena::Place;
use crate::dense::BLOCK_ROWS;
use crate::kernels::OutTile;
use crate::linear::multiply;
use crate::pool::Member;
use crate::program::{Experts, Gather, Product};

impl Part<'_> {
    /// The first member finds the rows of each expert.
    pub(super) fn route(&self, member: &Member<'_>, chosen: Place, to: usize, count: usize) {
        if member.index > 0 {
            return;
        }
        // SAFETY: nobody writes the numbers in this stage.
        let experts = (0..count).flat_map(|t| unsafe { self.arena.row(chosen, t) }).map(|e| *e as usize);
        write(&self.routes[to]).fill(self.program.routes[to], experts);
    }

    /// Members take every so many runs of rows.
    pub(super) fn gather(&self, member: &Member<'_>, work: &Work<'_>, gather: &Gather, scratch: &mut Vec<f32>) {
        let Gather { route, x, to } = gather;
        let (route, shape) = (read(&self.routes[*route]), &self.program.activations[*to].shape);
        for (i, run) in route.runs().iter().enumerate().skip(member.index).step_by(member.count) {
            scratch.clear();
            for row in route.of(run) {
                // SAFETY: nobody writes `x` in this stage.
                scratch.extend_from_slice(unsafe { self.arena.row(row.columns(*x, shape.cols()), row.token) });
            }
            let form = work.options.activations.of(run.rows.len());
            write(&self.quantized[*to][i]).fill(work.options.isa, form, shape, run.rows.len(), scratch);
        }
    }

    /// Members take output channels of every expert. Results are made in `scratch`: the rows of an expert lie apart.
    pub(super) fn experts(&self, member: &Member<'_>, work: &Work<'_>, experts: &Experts<'_>, scratch: &mut Scratch) {
        let Scratch { floats: scratch, weights, .. } = scratch;
        let Experts { route, product, rows: each, out } = experts;
        let route = read(&self.routes[*route]);
        for (i, run) in route.runs().iter().enumerate() {
            let tokens = run.rows.len();
            // The rows of the stacked matrices that are this expert's, and those that this member computes.
            let own = run.expert * each..(run.expert + 1) * each;
            let made = match product {
                Product::Packed { bytes, shape, x } => {
                    // A panel may hold the last rows of one expert and the first of the next.
                    let all = own.start / PANEL_ROWS..own.end.div_ceil(PANEL_ROWS);
                    let share = member.share(all.len(), 1);
                    let panels = all.start + share.start..all.start + share.end;
                    let rows = shape.panel_rows(panels.clone());
                    scratch.resize(tokens * rows.len(), 0.0);
                    let tile = OutTile::new(scratch, tokens, rows.len(), rows.len());
                    let bytes = self.program.memory.get(bytes);
                    let acts = read(&self.quantized[*x][i]);
                    multiply(work.options.isa, &[&acts], shape, bytes, panels, weights, tile);
                    rows
                }
                Product::Dense { weight, x } => {
                    let share = member.share(*each, BLOCK_ROWS);
                    let rows = own.start + share.start..own.start + share.end;
                    let mut gathered = Vec::with_capacity(tokens * weight.cols);
                    for row in route.of(run) {
                        // SAFETY: nobody writes `x` in this stage.
                        gathered.extend_from_slice(unsafe { self.arena.row(row.columns(*x, weight.cols), row.token) });
                    }
                    scratch.resize(tokens * rows.len(), 0.0);
                    let tile = OutTile::new(scratch, tokens, rows.len(), rows.len());
                    weight.multiply(rows.clone(), &gathered, tokens, &mut Vec::new(), tile);
                    rows
                }
            };
            let kept = made.start.max(own.start)..made.end.min(own.end);
            if kept.is_empty() {
                continue;
            }
            let (skip, first) = (kept.start - made.start, kept.start - own.start);
            for (row, result) in route.of(run).iter().zip(scratch.chunks_exact(made.len())) {
                let at = row.columns(*out, *each);
                let at = Place { col: at.col + first, width: kept.len(), ..at };
                // SAFETY: these channels of the expert's rows are this member's in this stage, and a row is in one run.
                unsafe { self.arena.row_mut(at, row.token) }.copy_from_slice(&result[skip..skip + kept.len()]);
            }
        }
    }
}
