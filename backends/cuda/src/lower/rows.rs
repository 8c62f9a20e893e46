//! Kernels of row steps: consecutive steps, and the rows that they read and write.

use super::flat::{By, Flat, Home, Var};
use super::schedule::Maker;
use crate::CudaError;
use crate::kernels::rows::{Kind, Out, Row, Rows, Step};
use crate::plan::{Extent, Given, Place};

impl Maker<'_, '_> {
    /// One kernel for row steps.
    pub(super) fn rows(&mut self, steps: &[&Flat]) -> Result<(), CudaError> {
        let mut args = RowArgs::default();
        let mut made = Vec::new();
        for step in steps {
            made.push(self.row_step(step, &mut args)?);
        }
        let rows = Rows { steps: made, args: args.kinds };
        let blocks = rows.blocks();
        let kernel = self.kernels.get(format!("{rows:?}"), |arch| rows.source(arch))?;
        let places = args.places.into_iter().chain([Place::Given(Given::Call)]).collect();
        // Rows of a token's experts are treated as those of so many tokens.
        let each = steps.first().map_or(1, |step| self.program.values[step.out()].rows);
        let count = if each == 1 { Extent::Tokens(1) } else { Extent::Rows(each as u32) };
        self.launch(kernel, [Extent::Fixed(blocks), count, Extent::Fixed(1)], places, true, true);
        Ok(())
    }

    fn row_step(&self, step: &Flat, args: &mut RowArgs) -> Result<Step, CudaError> {
        let width = |var: Var| self.program.values[var].width;
        let parts = self.program.values[step.out()].rows;
        let x_of = |args: &mut RowArgs, var: Var| {
            let row = self.row_for(var, parts);
            Row { arg: args.add(row.place, Kind::F32), pitch: row.pitch, col: row.col }
        };
        let constant =
            |args: &mut RowArgs, at: &Option<usize>| at.map(|c| args.add(Place::Constant(c), Kind::Parameter));
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
        Ok(match step {
            Flat::Embed { table, of, ints, offset, out } => {
                let table = args.add(Place::Constant(*table), Kind::Table(*of));
                let index = args.add(Place::Given(Given::Ints(*ints)), Kind::Ints);
                Step::Embed { table, of: *of, index, offset: *offset, width: width(*out), out: out_of(args, *out) }
            }
            Flat::Image { x, out } => Step::Image {
                x: x_of(args, *x),
                images: args.add(Place::Images, Kind::Parameter),
                index: args.add(Place::Given(Given::Places), Kind::Ints),
                width: width(*out),
                out: out_of(args, *out),
            },
            Flat::RmsNorm { x, gain, heads, eps, out } => Step::RmsNorm {
                x: x_of(args, *x),
                gain: constant(args, gain),
                heads: *heads,
                width: width(*x) / heads,
                eps: *eps,
                out: out_of(args, *out),
            },
            Flat::LayerNorm { x, gain, bias, heads, each, eps, out } => Step::LayerNorm {
                x: x_of(args, *x),
                gain: constant(args, gain),
                bias: constant(args, bias),
                heads: *heads,
                width: width(*x) / heads,
                each: *each,
                eps: *eps,
                out: out_of(args, *out),
            },
            Flat::Rope { x, angles, pairs, heads, interleaved, out } => {
                let mut angle =
                    |given| Row { arg: args.add(Place::Given(given), Kind::Parameter), pitch: *pairs, col: 0 };
                let (cos, sin) = (angle(Given::Cos(*angles)), angle(Given::Sin(*angles)));
                Step::Rope {
                    x: x_of(args, *x),
                    cos,
                    sin,
                    heads: *heads,
                    width: width(*x) / heads,
                    pairs: *pairs,
                    interleaved: *interleaved,
                    out: out_of(args, *out),
                }
            }
            Flat::Map { x, f, out } => {
                Step::Map { x: x_of(args, *x), f: *f, width: width(*out), out: out_of(args, *out) }
            }
            Flat::Zip { a, f, b, zip, out } => {
                let b = match b {
                    By::Value(b) => x_of(args, *b),
                    By::Constant(c) => Row { arg: args.add(Place::Constant(*c), Kind::Parameter), pitch: 0, col: 0 },
                };
                Step::Zip { a: x_of(args, *a), f: *f, b, zip: *zip, width: width(*out), out: out_of(args, *out) }
            }
            Flat::Repeat { x, times, out } => {
                Step::Repeat { x: x_of(args, *x), width: width(*x), times: *times, out: out_of(args, *out) }
            }
            Flat::Softmax { x, out } => Step::Softmax { x: x_of(args, *x), width: width(*x), out: out_of(args, *out) },
            Flat::Choose { scores, bias, of, out } => Step::Choose {
                scores: x_of(args, *scores),
                bias: constant(args, bias),
                of: *of,
                out: out_of(args, *out),
            },
            Flat::Combine { y, w, out } => Step::Combine {
                y: x_of(args, *y),
                w: x_of(args, *w),
                each: width(*w),
                stride: self.row(*y).pitch,
                width: width(*y),
                out: out_of(args, *out),
            },
            Flat::Packed { .. }
            | Flat::Dense { .. }
            | Flat::Attend { .. }
            | Flat::Route { .. }
            | Flat::Experts { .. } => {
                return Err(CudaError::Unsupported("a product is no row step".into()));
            }
        })
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
