//! From flat steps to a [`Program`]: values get places in the arena, steps are gathered in stages.
//!
//! A *slot* is a piece of the arena. Usually one value lies in it; a part of a split, and a value that was computed in
//! place, are further *views* of the slot of the value that they come from. A slot is free when no view of it will be
//! read any more and none is a result.

use std::collections::BTreeMap;

use awqc_ir::images::Placed;
use awqc_ir::op::Sdpa;
use awqc_ir::panels::Panels;

use super::weights::Matrix;
use crate::arena::Place;
use crate::cache::CacheShape;
use crate::experts::Choice;
use crate::program::{Attend, Experts, Gather, Linear, Product, Program, Rounded, Row, Stage};

/// Index of a value of the flat program.
pub(super) type Var = usize;

/// Index of a way of tokens to experts.
pub(super) type Way = usize;

/// Makes a row step, given the places that it reads and those of its results.
pub(super) type Made<'a> = Box<dyn FnOnce(&[Place], &[Place]) -> Row<'a> + 'a>;
/// Makes a row step, given the place that it changes and those that it reads.
pub(super) type Changed<'a> = Box<dyn FnOnce(Place, &[Place]) -> Row<'a> + 'a>;

/// A step before places are known.
pub(super) enum Flat<'a> {
    /// A row step that makes `out`, reading `with`.
    Make {
        with: Vec<Var>,
        out: Vec<Var>,
        step: Made<'a>,
    },
    /// A row step that changes `from` into `out`, reading `with`.
    Change {
        from: Var,
        with: Vec<Var>,
        out: Var,
        step: Changed<'a>,
    },
    /// `out` is columns of `from`.
    Window {
        from: Var,
        col: usize,
        out: Var,
    },
    /// `out` is the parts side by side.
    Join {
        parts: Vec<Var>,
        out: Var,
    },
    Linear {
        weight: Matrix<'a>,
        bias: Option<Vec<f32>>,
        x: Var,
        out: Var,
    },
    Attend {
        op: Sdpa,
        q: Var,
        k: Var,
        v: Var,
        out: Var,
    },
    /// Finds the rows of each of `experts`.
    Route {
        chosen: Var,
        experts: usize,
        route: Way,
    },
    /// `out` has the rows of all choices side by side; `x` too, or one row for all of them.
    Experts {
        weight: Matrix<'a>,
        route: Way,
        x: Var,
        out: Var,
    },
}

impl Flat<'_> {
    /// The values that the step looks at.
    fn reads(&self) -> Vec<Var> {
        match self {
            Flat::Make { with, .. } => with.clone(),
            Flat::Change { from, with, .. } => [*from].into_iter().chain(with.iter().copied()).collect(),
            Flat::Window { from, .. } => vec![*from],
            Flat::Join { parts, .. } => parts.clone(),
            Flat::Linear { x, .. } => vec![*x],
            Flat::Attend { q, k, v, .. } => vec![*q, *k, *v],
            Flat::Route { chosen, .. } => vec![*chosen],
            Flat::Experts { x, .. } => vec![*x],
        }
    }
}

/// The flat steps of a part of a module, in order.
#[derive(Default)]
pub(super) struct FlatProgram<'a> {
    /// Columns of every value.
    pub(super) widths: Vec<usize>,
    pub(super) steps: Vec<Flat<'a>>,
    pub(super) images: Option<Placed>,
    /// The values that the caller puts in place.
    pub(super) given: Vec<Var>,
    /// The values that the caller reads.
    pub(super) results: Vec<Var>,
}

/// Gives every value a place and gathers the steps in stages.
pub(super) fn place(flat: FlatProgram<'_>) -> Program<'_> {
    let mut vars: Vec<Info> = flat.widths.iter().map(|width| Info::new(*width)).collect();
    for var in flat.steps.iter().flat_map(Flat::reads) {
        vars[var].uses += 1;
    }
    flat.results.iter().for_each(|r| vars[*r].result = true);
    let mut placer = Placer { vars, ..Placer::default() };
    placer.program.images = flat.images;
    for step in &flat.steps {
        if let Flat::Experts { route, .. } = step {
            *placer.ways.entry(*route).or_default() += 1;
        }
    }
    for var in flat.given {
        let place = placer.allocate(var);
        placer.program.inputs.push(place);
    }
    flat.steps.into_iter().for_each(|step| placer.step(step));
    placer.program.results = flat.results.iter().map(|r| placer.place(*r)).collect();
    placer.program
}

/// What is known of a value.
struct Info {
    width: usize,
    /// Reads that are still to come.
    uses: usize,
    result: bool,
    /// Its slot and its first column there, once it is computed.
    view: Option<(usize, usize)>,
}

impl Info {
    fn new(width: usize) -> Self {
        Self { width, uses: 0, result: false, view: None }
    }

    /// Whether its numbers are needed after the current step.
    fn needed(&self) -> bool {
        self.uses > 0 || self.result
    }
}

/// A piece of the arena.
#[derive(Clone, Copy)]
struct Memory {
    base: usize,
    columns: usize,
}

struct Slot {
    memory: Memory,
    /// Columns of the value that the slot was made for.
    stride: usize,
    views: Vec<Var>,
}

#[derive(Default)]
struct Placer<'a> {
    vars: Vec<Info>,
    slots: Vec<Slot>,
    /// Memory that nothing uses.
    free: Vec<Memory>,
    /// Memory that became free in the current stage. It waits for the stage's end: another stride in the same memory
    /// would mix up the rows of different tokens, which members treat at different times.
    pending: Vec<Memory>,
    /// For each of the program's activations, the value whose rounded form is at hand, and whose way its rows follow.
    rounded: Vec<Option<(Var, Option<Way>)>>,
    /// For each way, the products that are still to come.
    ways: BTreeMap<Way, usize>,
    /// For each of the program's routes, the way that it holds.
    routes: Vec<Way>,
    program: Program<'a>,
}

impl<'a> Placer<'a> {
    /// The slot of a value that has been computed, and its first column there.
    fn slot(&self, var: Var) -> (usize, usize) {
        self.vars[var].view.expect("steps are in order: what one reads was computed before")
    }

    /// Where a value lies that has been computed.
    fn place(&self, var: Var) -> Place {
        let (slot, col) = self.slot(var);
        let slot = &self.slots[slot];
        Place { base: slot.memory.base, stride: slot.stride, col, width: self.vars[var].width }
    }

    /// The smallest piece of free memory that has so many columns, or new memory.
    fn memory(&mut self, columns: usize) -> Memory {
        let fits = (0..self.free.len()).filter(|i| self.free[*i].columns >= columns);
        match fits.min_by_key(|i| self.free[*i].columns) {
            Some(i) => self.free.swap_remove(i),
            None => {
                self.program.columns += columns;
                Memory { base: self.program.columns - columns, columns }
            }
        }
    }

    /// A slot for a value of its own.
    fn allocate(&mut self, var: Var) -> Place {
        let stride = self.vars[var].width;
        let memory = self.memory(stride);
        self.slots.push(Slot { memory, stride, views: Vec::new() });
        self.view(var, self.slots.len() - 1, 0);
        self.retire(self.slots.len() - 1);
        self.place(var)
    }

    /// Lets a value be columns of a slot.
    fn view(&mut self, var: Var, slot: usize, col: usize) {
        self.vars[var].view = Some((slot, col));
        self.slots[slot].views.push(var);
    }

    /// One read of a value is done.
    fn release(&mut self, var: Var) {
        self.vars[var].uses -= 1;
        self.retire(self.slot(var).0);
    }

    /// Frees a slot's memory behind the current stage if none of its views is needed.
    fn retire(&mut self, slot: usize) {
        if !self.slots[slot].views.iter().any(|v| self.vars[*v].needed()) {
            self.pending.push(self.slots[slot].memory);
        }
    }

    /// Whether nothing but the current read needs the columns of `var` any more.
    fn dies(&self, var: Var) -> bool {
        if self.vars[var].uses > 1 || self.vars[var].result {
            return false;
        }
        let columns = |var| {
            let place = self.place(var);
            place.col..place.col + place.width
        };
        let own = columns(var);
        let others = self.slots[self.slot(var).0].views.iter().filter(|v| **v != var && self.vars[**v].needed());
        others.map(|v| columns(*v)).all(|c| c.end <= own.start || own.end <= c.start)
    }

    fn rows(&mut self, step: Row<'a>) {
        match self.program.stages.last_mut() {
            Some(Stage::Rows(steps)) => steps.push(step),
            _ => self.program.stages.push(Stage::Rows(vec![step])),
        }
    }

    /// What was freed before a barrier may be used behind it.
    fn barrier(&mut self) {
        self.free.append(&mut self.pending);
    }

    fn step(&mut self, step: Flat<'a>) {
        match step {
            Flat::Window { from, col, out } => {
                let (slot, first) = self.slot(from);
                self.view(out, slot, first + col);
                self.release(from);
            }
            Flat::Make { with, out, step } => {
                let by: Vec<Place> = with.iter().map(|w| self.place(*w)).collect();
                let places: Vec<Place> = out.iter().map(|o| self.allocate(*o)).collect();
                self.rows(step(&by, &places));
                with.into_iter().for_each(|v| self.release(v));
            }
            Flat::Change { from, with, out, step } => {
                let by: Vec<Place> = with.iter().map(|w| self.place(*w)).collect();
                let at = if self.dies(from) {
                    let (slot, col) = self.slot(from);
                    self.view(out, slot, col);
                    self.place(from)
                } else {
                    let to = self.allocate(out);
                    self.rows(Row::Copy { from: self.place(from), to });
                    to
                };
                self.rows(step(at, &by));
                [from].into_iter().chain(with).for_each(|v| self.release(v));
            }
            Flat::Join { parts, out } => {
                let to = self.allocate(out);
                let mut col = 0;
                for part in parts {
                    let from = self.place(part);
                    self.rows(Row::Copy { from, to: Place { col: to.col + col, width: from.width, ..to } });
                    col += from.width;
                    self.release(part);
                }
            }
            Flat::Linear { weight, bias, x, out } => match weight {
                Matrix::Packed { bytes, shape } => {
                    let (from, copy) = self.whole(x);
                    let at = self.round(x, from, &shape);
                    // The product reads the rounded form only.
                    self.release(x);
                    self.pending.extend(copy);
                    self.barrier();
                    let out = self.allocate(out);
                    let product = Product::Packed { bytes, shape, x: at };
                    self.program.stages.push(Stage::Linear(Linear { product, bias, out }));
                    self.barrier();
                }
                Matrix::Dense(weight) => {
                    let (from, copy) = self.whole(x);
                    self.barrier();
                    let out = self.allocate(out);
                    let product = Product::Dense { weight, x: from };
                    self.program.stages.push(Stage::Linear(Linear { product, bias, out }));
                    self.release(x);
                    self.pending.extend(copy);
                    self.barrier();
                }
            },
            Flat::Attend { op, q, k, v, out } => {
                let cache = self.program.caches.len();
                let (k_at, v_at, q_at) = (self.place(k), self.place(v), self.place(q));
                let heads = op.kv_heads as usize;
                self.program.caches.push(CacheShape { heads, keys: k_at.width, values: v_at.width });
                self.rows(Row::Remember { k: k_at, v: v_at, cache });
                // From here on the cache has them.
                self.release(k);
                self.release(v);
                self.barrier();
                let out = self.allocate(out);
                self.program.stages.push(Stage::Attend(Attend { op, q: q_at, cache, out }));
                self.release(q);
                self.barrier();
            }
            Flat::Route { chosen, experts, route } => {
                let place = self.place(chosen);
                let to = self.route(route, Choice { experts, each: place.width });
                self.program.stages.push(Stage::Route { chosen: place, to });
                self.release(chosen);
                self.barrier();
            }
            Flat::Experts { weight, route: way, x, out } => {
                let from = self.place(x);
                let route = self.routes.iter().position(|w| *w == way).expect("a route is found before its products");
                if let Some(left) = self.ways.get_mut(&way) {
                    *left -= 1;
                }
                let (product, all, unread) = match weight {
                    Matrix::Packed { bytes, shape } => {
                        let (at, made) = self.rounded(x, &shape, Some((route, way)));
                        if !made {
                            self.program.stages.push(Stage::Gather(Gather { route, x: from, to: at }));
                        }
                        // The product reads the rounded form only.
                        self.release(x);
                        (Product::Packed { bytes, shape, x: at }, shape.rows(), None)
                    }
                    Matrix::Dense(weight) => {
                        let all = weight.rows;
                        (Product::Dense { weight, x: from }, all, Some(x))
                    }
                };
                self.barrier();
                let rows = all / self.program.routes[route].experts.max(1);
                let out = self.allocate(out);
                self.program.stages.push(Stage::Experts(Experts { route, product, rows, out }));
                unread.into_iter().for_each(|x| self.release(x));
                self.barrier();
            }
        }
    }

    /// The place of a value whose rows follow each other without a gap: a window is copied out of its slot, to memory
    /// that the caller frees.
    fn whole(&mut self, var: Var) -> (Place, Option<Memory>) {
        let from = self.place(var);
        if from.stride == from.width {
            return (from, None);
        }
        let memory = self.memory(from.width);
        let to = Place { base: memory.base, stride: from.width, col: 0, width: from.width };
        self.rows(Row::Copy { from, to });
        (to, Some(memory))
    }

    /// The index of the rounded form of `x` for weights of this shape, which is made if it is not at hand.
    fn round(&mut self, x: Var, place: Place, shape: &Panels) -> usize {
        let (at, made) = self.rounded(x, shape, None);
        if !made {
            self.rows(Row::Quantize { x: place, to: at });
        }
        at
    }

    /// The index of the rounded form of `x` for weights of this shape, its rows in the order of a route and way if they
    /// are those of experts, and whether it is at hand already; from here on it is.
    fn rounded(&mut self, x: Var, shape: &Panels, rows: Option<(usize, Way)>) -> (usize, bool) {
        let (route, way) = rows.unzip();
        let fits = |have: &Rounded| have.shape.same_columns(shape) && have.route == route;
        let at = self.program.activations.iter().position(fits).unwrap_or_else(|| {
            self.program.activations.push(Rounded { shape: *shape, route });
            self.rounded.push(None);
            self.rounded.len() - 1
        });
        (at, self.rounded[at].replace((x, way)) == Some((x, way)))
    }

    /// A route for a way: one that no product follows any more, or a new one.
    fn route(&mut self, way: Way, choice: Choice) -> usize {
        let free = |at: &usize| self.program.routes[*at] == choice && self.ways.get(&self.routes[*at]) == Some(&0);
        let at = (0..self.routes.len()).find(free).unwrap_or_else(|| {
            self.program.routes.push(choice);
            self.routes.push(way);
            self.routes.len() - 1
        });
        self.routes[at] = way;
        at
    }
}
