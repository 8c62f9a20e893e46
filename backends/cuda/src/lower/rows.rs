//! Kernels of row steps: consecutive steps, and the rows that they read and write.

use super::flat::{By, Home, RowOp, Var};
use super::schedule::Maker;
use crate::CudaError;
use crate::kernels::rows::{Kind, Out, Row, Rows, Step};
use crate::plan::{Extent, Given, Place};

impl Maker<'_, '_> {
    /// One kernel for row steps.
    pub(super) fn rows(&mut self, steps: &[(RowOp, Var)]) -> Result<(), CudaError> {
        let mut args = RowArgs::default();
        let mut made = Vec::new();
        for (op, out) in steps {
            made.push(self.row_step(*op, *out, &mut args));
        }
        let rows = Rows { steps: made, args: args.kinds };
        let blocks = rows.blocks();
        let kernel = self.kernels.get(format!("{rows:?}"), |arch| rows.source(arch))?;
        let places = args.places.into_iter().chain([Place::Given(Given::Call)]).collect();
        // Rows of a token's experts are treated as those of so many tokens.
        let each = steps.first().map_or(1, |(_, out)| self.program.values[*out].rows);
        let count = if each == 1 { Extent::Tokens(1) } else { Extent::Rows(each as u32) };
        self.launch(kernel, [Extent::Fixed(blocks), count, Extent::Fixed(1)], places, true, true);
        Ok(())
    }

    fn row_step(&self, op: RowOp, out: Var, args: &mut RowArgs) -> Step {
        let width = |var: Var| self.program.values[var].width;
        let parts = self.program.values[out].rows;
        let x_of = |args: &mut RowArgs, var: Var| {
            let row = self.row_for(var, parts);
            Row { arg: args.add(row.place, Kind::F32), pitch: row.pitch, col: row.col }
        };
        let constant =
            |args: &mut RowArgs, at: Option<usize>| at.map(|c| args.add(Place::Constant(c), Kind::Parameter));
        let out_of = |args: &mut RowArgs, var: Var| {
            let row = self.row_for(var, parts);
            let kind = match self.program.values[self.program.root(var).0].home {
                Home::F32 | Home::View(..) => Kind::F32,
                Home::F16 | Home::Cache(_) => Kind::F16,
            };
            let at = Row { arg: args.add(row.place, kind), pitch: row.pitch, col: row.col };
            match (kind, row.place) {
                (Kind::F16, Place::Cache(_)) => Out::Cache(at),
                (Kind::F16, _) => Out::F16(at),
                (_, _) => Out::F32(at),
            }
        };
        match op {
            RowOp::Embed { table, of, ints, offset } => {
                let table = args.add(Place::Constant(table), Kind::Table(of));
                let index = args.add(Place::Given(Given::Ints(ints)), Kind::Ints);
                Step::Embed { table, of, index, offset, width: width(out), out: out_of(args, out) }
            }
            RowOp::Image { x } => Step::Image {
                x: x_of(args, x),
                images: args.add(Place::Images, Kind::Parameter),
                index: args.add(Place::Given(Given::Places), Kind::Ints),
                width: width(out),
                out: out_of(args, out),
            },
            RowOp::RmsNorm { x, gain, heads, eps } => Step::RmsNorm {
                x: x_of(args, x),
                gain: constant(args, gain),
                heads,
                width: width(x) / heads,
                eps,
                out: out_of(args, out),
            },
            RowOp::LayerNorm { x, gain, bias, heads, each, eps } => Step::LayerNorm {
                x: x_of(args, x),
                gain: constant(args, gain),
                bias: constant(args, bias),
                heads,
                width: width(x) / heads,
                each,
                eps,
                out: out_of(args, out),
            },
            RowOp::Rope { x, angles, pairs, heads, interleaved } => {
                let mut angle =
                    |given| Row { arg: args.add(Place::Given(given), Kind::Parameter), pitch: pairs, col: 0 };
                let (cos, sin) = (angle(Given::Cos(angles)), angle(Given::Sin(angles)));
                Step::Rope {
                    x: x_of(args, x),
                    cos,
                    sin,
                    heads,
                    width: width(x) / heads,
                    pairs,
                    interleaved,
                    out: out_of(args, out),
                }
            }
            RowOp::Map { x, f } => Step::Map { x: x_of(args, x), f, width: width(out), out: out_of(args, out) },
            RowOp::Zip { a, f, b, zip } => {
                let b = match b {
                    By::Value(b) => x_of(args, b),
                    By::Constant(c) => Row { arg: args.add(Place::Constant(c), Kind::Parameter), pitch: 0, col: 0 },
                };
                Step::Zip { a: x_of(args, a), f, b, zip, width: width(out), out: out_of(args, out) }
            }
            RowOp::Repeat { x, times } => {
                Step::Repeat { x: x_of(args, x), width: width(x), times, out: out_of(args, out) }
            }
            RowOp::Softmax { x } => Step::Softmax { x: x_of(args, x), width: width(x), out: out_of(args, out) },
            RowOp::Choose { scores, bias, of } => {
                Step::Choose { scores: x_of(args, scores), bias: constant(args, bias), of, out: out_of(args, out) }
            }
            RowOp::Combine { y, w } => Step::Combine {
                y: x_of(args, y),
                w: x_of(args, w),
                each: width(w),
                stride: self.row(y).pitch,
                width: width(y),
                out: out_of(args, out),
            },
        }
    }
}

/// The arguments of a row kernel: each place once.
#[derive(Default)]
struct RowArgs {
    places: Vec<Place>,
    kinds: Vec<Kind>,
}

impl RowArgs {
    fn add(&mut self, place: Place, kind: Kind) -> usize {
        let known = self.places.iter().zip(&self.kinds).position(|(p, k)| *p == place && *k == kind);
        known.unwrap_or_else(|| {
            self.places.push(place);
            self.kinds.push(kind);
            self.places.len() - 1
        })
    }
}
