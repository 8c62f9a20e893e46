//! Mixtures of experts: which rows a value has between `dispatch` and `combine`, and the products with stacked weights.
//!
//! There, a value has for each token the rows of its experts side by side, and whatever treats a row by itself runs on
//! them as on the rows of so many tokens. What was dispatched has the one row of a token, until something changes it.

use std::collections::BTreeMap;

use awqc_ir::Op;
use awqc_ir::op::{Dispatch, TopK};

use super::constants::Matrix;
use super::flat::{Flat, FlatOp, Home, RowOp, Var};
use super::schedule::{Maker, name};
use super::{Builder, CHUNK, Entry};
use crate::CudaError;
use crate::kernels::routed::{Routed, Stack};
use crate::kernels::rows::{Choice, Map};
use crate::kernels::{dense, gemm, gemv, route};
use crate::plan::{Extent, Given, Place};

/// The way of a value's rows to experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// The value with the tokens' records: weights, and numbers of experts.
    records: Var,
    pub(super) stack: Stack,
}

impl Builder<'_> {
    /// The way of an op's operands to experts, if they take one. Those that still have one row for all experts of a
    /// token get one for each, unless the op is a product, which changes none.
    pub(super) fn apart(&mut self, op: &Op, operands: &mut [Entry]) -> Result<Option<Way>, String> {
        let mut way = None;
        for entry in operands.iter_mut() {
            let Entry::Experts(var, of) = *entry else { continue };
            if way.is_some_and(|way| way != of) {
                return Err("the operands go to experts by different choices".into());
            }
            way = Some(of);
            let each = of.stack.each as usize;
            if self.flat.values[var].rows != each && !matches!(op, Op::Linear(_)) {
                let width = self.flat.values[var].width;
                let copies = self.flat.rows(width, each, Home::F32);
                // As a part of a token's row, each is written by a step that takes the token as a whole.
                for j in 0..each {
                    let part = self.flat.value(width, Home::View(copies, j * width));
                    self.map(var, Map::Same, part);
                }
                *entry = Entry::Experts(copies, of);
            }
        }
        if way.is_some() && matches!(op, Op::Rope(_) | Op::Sdpa(_) | Op::TopK(_) | Op::Dispatch(_)) {
            return Err("rows of experts have no kernel for it".into());
        }
        Ok(way)
    }

    /// Chooses experts; returns the value with the tokens' records. `outs` become columns of it.
    pub(super) fn choose(&mut self, op: &TopK, scores: Var, bias: Option<usize>, outs: &[Var]) -> Result<Var, String> {
        let of = Choice::of(op, self.flat.values[scores].width)?;
        let each = of.each as usize;
        let records = self.flat.value(2 * each, Home::F32);
        for (i, out) in outs.iter().enumerate() {
            self.flat.values[*out].home = Home::View(records, i * each);
        }
        self.flat.push(RowOp::Choose { scores, bias, of }, records);
        Ok(records)
    }

    /// The way of rows to the experts that `chosen` names.
    pub(super) fn dispatch(&self, op: &Dispatch, chosen: Option<&Entry>) -> Result<Way, String> {
        let Some(Entry::Chosen(records)) = chosen.copied() else {
            return Err("the experts must be those of a top_k".into());
        };
        let experts = u32::try_from(op.experts).ok().filter(|e| *e <= route::THREADS);
        let experts = experts.ok_or_else(|| format!("no kernel sorts the rows of {} experts", op.experts))?;
        let each = (self.flat.values[records].width / 2) as u32;
        Ok(Way { records, stack: Stack { experts, each, shared: false } })
    }

    /// Adds up what the experts of each token say.
    pub(super) fn combine(&mut self, operands: &[Entry], out: Var) -> Result<(), String> {
        match operands {
            [Entry::Experts(y, way), Entry::Value(w), Entry::Chosen(chosen)] if way.records == *chosen => {
                self.flat.push(RowOp::Combine { y: *y, w: *w }, out);
                Ok(())
            }
            _other => Err("its rows must be those of the experts that it names".into()),
        }
    }

    /// A product of each row with the matrix of its expert.
    pub(super) fn stacked(&mut self, weight: Matrix, way: Way, halves: &mut BTreeMap<Var, Var>, x: Var, out: Var) {
        let Way { records, stack } = way;
        let stack = Stack { shared: self.flat.values[x].rows != stack.each as usize, ..stack };
        let (x, tile) = match weight {
            Matrix::Packed { .. } => {
                (self.half(halves, x), gemm::tile(CHUNK * stack.each as usize / stack.experts.max(1) as usize))
            }
            Matrix::Dense { .. } => (self.whole(x), dense::TOKENS),
        };
        let route = match self.flat.routes.get(&(records, tile)) {
            Some(route) => *route,
            None => {
                let out = self.flat.value(route::words(stack.each as usize), Home::F32);
                self.flat.push(FlatOp::Route { records, stack, tile }, out);
                self.flat.routes.insert((records, tile), out);
                out
            }
        };
        self.flat.push(FlatOp::Experts { weight, stack, records, route, tile, x }, out);
    }
}

impl Maker<'_, '_> {
    /// The launch that puts many tokens in the order of their experts. Few need no order.
    pub(super) fn route(&mut self, records: Var, stack: Stack, tile: u32, out: Var) -> Result<(), CudaError> {
        let Stack { experts, each, .. } = stack;
        let key = format!("route {experts} {each} {tile}");
        let kernel = self.kernels.get(key, |a| route::source(a, experts, each, tile))?;
        let one = Extent::Fixed(1);
        let args = vec![self.row(records).place, self.row(out).place, Place::Given(Given::Call)];
        self.launch(kernel, [one, one, one], args, false, true);
        Ok(())
    }

    /// The launches of a product with stacked weights.
    pub(super) fn experts(&mut self, step: &Flat) -> Result<(), CudaError> {
        let Flat { op: FlatOp::Experts { weight, stack, records, route, tile, x }, out } = *step else { return Ok(()) };
        let Stack { experts, each, .. } = stack;
        let call = Place::Given(Given::Call);
        let (rows, cols) = (self.program.values[out].width, self.program.values[x].width);
        let (x, y) = (self.row(x).place, self.row(out).place);
        let (few, many) = (Routed::Few(stack), Routed::Many(stack));
        let runs = Extent::Runs { experts, each, tile };
        let (bytes, args, few, many) = match weight {
            Matrix::Packed { weight, shape } => {
                let panels = stack.span(rows) as u32;
                let key = format!("gemv {shape:?} {few:?}");
                let few = self.kernels.get(key, |a| gemv::routed_source(a, &shape, few))?;
                let key = format!("gemm {shape:?} {many:?} {tile}");
                let many = self.kernels.get(key, |a| gemm::routed_source(a, &shape, many, tile))?;
                let weight = Place::Constant(weight);
                (
                    shape.total_bytes(),
                    vec![weight, weight, x, y, call],
                    (few, panels),
                    (many, panels.div_ceil(gemm::WARPS)),
                )
            }
            Matrix::Dense { weight, of } => {
                self.kernels.remark(format!(
                    "a {} weight [{experts},{rows},{cols}] is multiplied without tensor cores: many tokens are slow",
                    name(of)
                ));
                let mut kernel = |routed: Routed| {
                    let key = format!("dense {of:?} {rows} {cols} {routed:?}");
                    self.kernels.get(key, |a| dense::routed_source(a, of, rows, cols, routed))
                };
                let (few, many) = (kernel(few)?, kernel(many)?);
                let blocks = rows.div_ceil(dense::ROWS as usize) as u32;
                let bytes = experts as usize * rows * cols * of.bytes();
                (bytes, vec![Place::Constant(weight), x, y, call], (few, blocks), (many, blocks))
            }
        };
        // A token reads the matrices of its own experts.
        self.weight_bytes += bytes / experts.max(1) as usize * each as usize;
        for ((kernel, blocks), grid, order) in [(few, Extent::Rows(each), records), (many, runs, route)] {
            let grid = [Extent::Fixed(blocks), grid, Extent::Fixed(1)];
            let args = args.iter().copied().chain([self.row(order).place]).collect();
            self.launch(kernel, grid, args, order == records, order == route);
        }
        Ok(())
    }
}
