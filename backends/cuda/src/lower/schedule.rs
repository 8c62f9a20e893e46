//! From flat steps to launches: values get memory for as long as they are needed, row steps are gathered, and every
//! step gets the kernel for its shapes.

use std::collections::BTreeMap;

use super::flat::{Flat, FlatOp, FlatProgram, Home, RowOp, Var};
use super::memory::Memory;
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::Source;
use crate::kernels::attend::{self, Shape};
use crate::kernels::{Float, argmax, dense, divide, flash, gemm, gemv, top};
use crate::plan::{Extent, FEW, Given, Kernel, Launch, Part, Place, Top};

/// Values start at multiples of so many bytes.
pub(super) const ALIGN: usize = 256;
/// Blocks that a decoding attention should have, so that a device is busy with it.
const BLOCKS: usize = 256;
/// The most parts that positions are cut into.
const MOST_SPLITS: usize = 16;

/// The kernels so far. Each text comes once.
pub(super) struct Kernels<'a> {
    arch: &'a Arch,
    pub(super) sources: Vec<Source>,
    /// What was asked for, and the kernel that it became.
    known: BTreeMap<String, usize>,
    /// Products whose columns are divided among blocks: rows and columns, and blocks.
    divided: BTreeMap<(usize, usize), usize>,
    remarks: Vec<String>,
}

impl<'a> Kernels<'a> {
    pub(super) fn new(arch: &'a Arch) -> Self {
        Self { arch, sources: Vec::new(), known: BTreeMap::new(), divided: BTreeMap::new(), remarks: Vec::new() }
    }

    pub(super) fn get(
        &mut self,
        key: String,
        make: impl FnOnce(&Arch) -> Result<Source, CudaError>,
    ) -> Result<usize, CudaError> {
        if let Some(at) = self.known.get(&key) {
            return Ok(*at);
        }
        let source = make(self.arch)?;
        let at = self.sources.iter().position(|s| *s == source).unwrap_or_else(|| {
            self.sources.push(source);
            self.sources.len() - 1
        });
        self.known.insert(key, at);
        Ok(at)
    }

    /// Finds the largest of the logits at `from`, and leaves its place at `to`.
    pub(super) fn choice(&mut self, vocabulary: usize, from: usize, to: usize) -> Result<Launch, CudaError> {
        let kernel = self.get(format!("argmax {vocabulary}"), |arch| argmax::source(arch, vocabulary))?;
        let grid = [Extent::Fixed(1), Extent::Fixed(1), Extent::Fixed(1)];
        Ok(Launch { kernel, grid, args: vec![Place::Arena(from), Place::Arena(to)] })
    }

    /// Finds the largest of the logits at `from`, with memory from `base` on; and where that ends.
    pub(super) fn top(&mut self, vocabulary: usize, from: usize, base: usize) -> Result<(Top, usize), CudaError> {
        let (mut launches, mut end, mut found) = (Vec::new(), base, base);
        let mut candidates = vec![Place::Arena(from)];
        for (i, count) in top::rounds(vocabulary).into_iter().enumerate() {
            let kernel = self.get(format!("top {count} {i}"), |arch| top::source(arch, count, i == 0))?;
            let blocks = top::blocks(count);
            let values = end;
            let ids = values + 4 * blocks * top::KEPT as usize;
            end = (ids + 4 * blocks * top::KEPT as usize).next_multiple_of(ALIGN);
            let kept = vec![Place::Arena(values), Place::Arena(ids)];
            let grid = [Extent::Fixed(blocks as u32), Extent::Fixed(1), Extent::Fixed(1)];
            launches.push(Launch { kernel, grid, args: [candidates, kept.clone()].concat() });
            (candidates, found) = (kept, values);
        }
        Ok((Top { launches, count: top::KEPT as usize, found }, end))
    }

    pub(super) fn list(&self) -> Vec<Kernel> {
        let kernel = |s: &Source| Kernel {
            name: s.name.clone(),
            threads: s.threads,
            shared_bytes: s.shared_bytes,
            args: s.args,
        };
        self.sources.iter().map(kernel).collect()
    }

    fn divided(&mut self, rows: usize, cols: usize, splits: usize) {
        self.divided.insert((rows, cols), splits);
    }

    /// What people should know.
    pub(super) fn remarks(&self) -> Vec<String> {
        let each = |((rows, cols), splits): (&(usize, usize), &usize)| format!("[{rows},{cols}] among {splits}");
        let divided: Vec<String> = self.divided.iter().map(each).collect();
        let divided = (!divided.is_empty()).then(|| {
            format!(
                "the columns of these products are divided among blocks, as fits a device of {} multiprocessors and {} \
                 GB/s: {}",
                self.arch.multiprocessors,
                self.arch.gigabytes_per_second,
                divided.join(", ")
            )
        });
        self.remarks.iter().cloned().chain(divided).collect()
    }

    pub(super) fn remark(&mut self, text: String) {
        if !self.remarks.contains(&text) {
            self.remarks.push(text);
        }
    }
}

/// A scheduled part of the module.
pub(super) struct Scheduled {
    pub(super) part: Part,
    /// Bytes of memory behind the first address.
    pub(super) bytes: usize,
    /// Where the results are: offset in bytes, and columns from one token to the next.
    pub(super) results: Vec<(usize, usize)>,
    /// Bytes of the matrices.
    pub(super) weight_bytes: usize,
}

/// A step between two launches, or several that become one.
pub(super) enum Group<'p> {
    Rows(Vec<(RowOp, Var)>),
    One(&'p Flat),
}

/// Gives values memory from `base` on, for `tokens` tokens, and makes the launches. `given` is where the given values
/// lie.
pub(super) fn schedule(
    program: &FlatProgram,
    tokens: usize,
    base: usize,
    given: &[(usize, usize)],
    kernels: &mut Kernels<'_>,
) -> Result<Scheduled, CudaError> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let rows = |out: Var| program.values[out].rows;
    for step in &program.steps {
        let Flat { op: FlatOp::Row(op), out } = *step else {
            groups.push(Group::One(step));
            continue;
        };
        match groups.last_mut() {
            Some(Group::Rows(steps)) if steps.first().is_some_and(|(_, first)| rows(*first) == rows(out)) => {
                steps.push((op, out));
            }
            Some(_) | None => groups.push(Group::Rows(vec![(op, out)])),
        }
    }
    let partials = partials(program, &groups, kernels.arch)?;
    let memory = Memory::of(program, &groups, &partials, tokens, base);
    let given = program.given.iter().copied().zip(given.iter().copied()).collect();
    let mut maker = Maker { program, kernels, memory: &memory, given, part: Part::default(), weight_bytes: 0 };
    for (group, partials) in groups.iter().zip(&memory.partials) {
        match group {
            Group::Rows(steps) => maker.rows(steps)?,
            Group::One(step) => maker.step(step, *partials)?,
        }
    }
    let results = program.results.iter().map(|r| {
        let row = maker.row(*r);
        (row.offset + row.col * 4, row.pitch)
    });
    let results = results.collect();
    Ok(Scheduled { results, weight_bytes: maker.weight_bytes, part: maker.part, bytes: memory.end - base })
}

/// The attention of a step, for few tokens.
fn shape(program: &FlatProgram, step: &Flat, splits: Option<usize>) -> Result<Option<Shape>, CudaError> {
    let Flat { op: FlatOp::Attend { op, q, values, .. }, out } = step else { return Ok(None) };
    let (heads, kv_heads) = (op.heads as usize, op.kv_heads as usize);
    let (key, value) = (program.values[*q].width / heads, program.values[*values].width / kv_heads);
    let half = program.values[*out].home == Home::F16;
    let splits = splits.unwrap_or_else(|| (BLOCKS / heads).clamp(1, MOST_SPLITS));
    let mut shape = Shape::of(op, key, value, half, splits).map_err(CudaError::Unsupported)?;
    let (root, col) = program.root(*q);
    (shape.pitch, shape.col) = (program.values[root].width, col);
    Ok(Some(shape))
}

/// Bytes of partial results behind each group.
fn partials(program: &FlatProgram, groups: &[Group<'_>], arch: &Arch) -> Result<Vec<usize>, CudaError> {
    let bytes = |group: &Group<'_>| match group {
        Group::Rows(_) => Ok(0),
        Group::One(Flat { op: FlatOp::Packed { shape, .. }, .. }) => {
            Ok(gemv::partials(shape, divide::splits(arch, shape)) * 4)
        }
        Group::One(step) => Ok(shape(program, step, None)?.map_or(0, |s| s.partials() * FEW * 4)),
    };
    groups.iter().map(bytes).collect()
}

/// Where a value's rows lie.
#[derive(Clone, Copy)]
pub(super) struct Rowed {
    pub(super) place: Place,
    offset: usize,
    pub(super) pitch: usize,
    pub(super) col: usize,
}

/// Makes launches.
pub(super) struct Maker<'a, 'c> {
    pub(super) program: &'a FlatProgram,
    pub(super) kernels: &'a mut Kernels<'c>,
    memory: &'a Memory,
    given: BTreeMap<Var, (usize, usize)>,
    part: Part,
    pub(super) weight_bytes: usize,
}

impl Maker<'_, '_> {
    pub(super) fn row(&self, var: Var) -> Rowed {
        self.row_for(var, self.program.values[var].rows)
    }

    /// The rows of a value as steps see them that take a token in so many parts. One that takes it as a whole has the
    /// rows of its experts side by side.
    pub(super) fn row_for(&self, var: Var, parts: usize) -> Rowed {
        let (root, col) = self.program.root(var);
        let pitch = self.program.values[root].width * self.program.values[root].rows / parts.max(1);
        if let Some((offset, pitch)) = self.given.get(&root) {
            return Rowed { place: Place::Stream(*offset, pitch * 4), offset: *offset, pitch: *pitch, col };
        }
        if let Home::Cache(i) = self.program.values[root].home {
            return Rowed { place: Place::Cache(i), offset: 0, pitch, col };
        }
        let offset = self.memory.offsets[root].expect("a step computes every value, and has memory for it");
        Rowed { place: Place::Arena(offset), offset, pitch, col }
    }

    pub(super) fn launch(&mut self, kernel: usize, grid: [Extent; 3], args: Vec<Place>, few: bool, many: bool) {
        let launch = Launch { kernel, grid, args };
        if few {
            self.part.few.push(launch.clone());
        }
        if many {
            self.part.many.push(launch);
        }
    }

    /// The launches of a step that is no row step.
    fn step(&mut self, step: &Flat, partials: usize) -> Result<(), CudaError> {
        let call = Place::Given(Given::Call);
        let (one, single) = (Extent::Fixed(1), Extent::Tokens(1));
        let Flat { op, out } = step;
        match op {
            FlatOp::Packed { weight, shape, bias, x } => {
                let place = Place::Constant(*weight);
                let mut args = vec![place, place, self.row(*x).place];
                args.extend(bias.map(Place::Constant));
                args.extend([self.row(*out).place, call]);
                self.weight_bytes += shape.total_bytes();
                let (shape, bias) = (*shape, bias.is_some());
                let panels = shape.panels() as u32;
                let splits = divide::splits(self.kernels.arch, &shape);
                if splits == 1 {
                    let few = self.kernels.get(format!("gemv {shape:?} {bias}"), |a| gemv::source(a, &shape, bias))?;
                    let grid = [Extent::Fixed(panels), Extent::Tokens(gemv::TOKENS), one];
                    self.launch(few, grid, args.clone(), true, false);
                } else {
                    self.kernels.divided(shape.rows(), shape.cols(), splits);
                    let key = format!("gemv {shape:?} {bias} {splits}");
                    let few = self.kernels.get(key, |a| gemv::split_source(a, &shape, bias, splits))?;
                    let grid = [Extent::Fixed(panels), Extent::Tokens(gemv::TOKENS), Extent::Fixed(splits as u32)];
                    let more = [Place::Arena(partials), call];
                    self.launch(few, grid, args.iter().copied().chain(more).collect(), true, false);
                }
                let many = self.kernels.get(format!("gemm {shape:?} {bias}"), |a| gemm::source(a, &shape, bias))?;
                let grid = [Extent::Fixed(panels.div_ceil(gemm::WARPS)), Extent::Tokens(gemm::TOKENS), one];
                self.launch(many, grid, args, false, true);
            }
            FlatOp::Dense { weight, of, bias, x } => {
                let (rows, cols) = (self.program.values[*out].width, self.program.values[*x].width);
                let mut args = vec![Place::Constant(*weight), self.row(*x).place];
                args.extend(bias.map(Place::Constant));
                args.extend([self.row(*out).place, call]);
                self.weight_bytes += rows * cols * of.bytes();
                let (of, bias) = (*of, bias.is_some());
                self.kernels.remark(format!(
                    "a {} weight [{rows},{cols}] is multiplied without tensor cores: many tokens are slow",
                    name(of)
                ));
                let key = format!("dense {of:?} {rows} {cols} {bias}");
                let kernel = self.kernels.get(key, |a| dense::source(a, of, rows, cols, bias))?;
                let grid =
                    [Extent::Fixed(rows.div_ceil(dense::ROWS as usize) as u32), Extent::Tokens(dense::TOKENS), one];
                self.launch(kernel, grid, args, true, true);
            }
            FlatOp::Attend { q, keys, values, .. } => {
                for many in [false, true] {
                    let Some(shape) = shape(self.program, step, many.then_some(1))? else { continue };
                    let out = self.row(*out).place;
                    let split = shape.splits > 1;
                    let to = if split { Place::Arena(partials) } else { out };
                    let args = vec![self.row(*q).place, self.row(*keys).place, self.row(*values).place, to, call];
                    let heads = Extent::Fixed(shape.heads as u32);
                    let (kernel, grid) = match flash::covers(&shape) {
                        Ok(()) if many => {
                            let kernel = self.kernels.get(format!("flash {shape:?}"), |a| flash::source(a, &shape))?;
                            (kernel, [heads, Extent::Tokens(flash::tokens(&shape)), one])
                        }
                        why => {
                            if let (true, Err(why)) = (many, why) {
                                let slow = "runs without tensor cores: long prompts are slow";
                                self.kernels.remark(format!("attention {why} {slow}"));
                            }
                            let kernel =
                                self.kernels.get(format!("attend {shape:?}"), |a| attend::source(a, &shape))?;
                            (kernel, [heads, single, Extent::Fixed(shape.splits as u32)])
                        }
                    };
                    self.launch(kernel, grid, args, !many, many);
                    if split {
                        let key = format!("join {shape:?}");
                        let kernel = self.kernels.get(key, |a| attend::join_source(a, &shape))?;
                        self.launch(kernel, [heads, single, one], vec![Place::Arena(partials), out], !many, many);
                    }
                }
            }
            FlatOp::Row(op) => self.rows(&[(*op, *out)])?,
            FlatOp::Route { records, stack, tile } => self.route(*records, *stack, *tile, *out)?,
            FlatOp::Experts { .. } => self.experts(step)?,
        }
        Ok(())
    }
}

pub(super) fn name(of: Float) -> &'static str {
    match of {
        Float::F32 => "f32",
        Float::F16 => "f16",
        Float::Bf16 => "bf16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use awqc_ir::tiles::Tiles;
    use awqc_ir::{Group, Quant};

    #[test]
    fn a_product_that_is_divided_has_room_for_its_parts() {
        let quant = Quant { bits: 4, symmetric: false, group: Group::Size(128) };
        let shape = Tiles::of(quant, 40, 9728).unwrap();
        let mut flat = FlatProgram::default();
        let (x, out) = (flat.value(shape.cols(), Home::F16), flat.value(shape.rows(), Home::F32));
        flat.given = vec![x];
        flat.push(FlatOp::Packed { weight: 0, shape, bias: None, x }, out);
        flat.results = vec![out];
        let mut kernels = Kernels::new(Arch::find(90).unwrap());
        let base = 2 * FEW * shape.cols();
        let done = schedule(&flat, FEW, base, &[(0, shape.cols())], &mut kernels).unwrap();
        let [launch] = done.part.few.as_slice() else { panic!("{:?}", done.part.few) };
        let Extent::Fixed(splits) = launch.grid[2] else { panic!("{launch:?}") };
        assert!(splits > 1, "{launch:?}");
        let call = Place::Given(Given::Call);
        let [.., Place::Arena(y), first, Place::Arena(parts), last] = launch.args[..] else { panic!("{launch:?}") };
        assert_eq!((first, last), (call, call));
        let end = parts + 4 * gemv::partials(&shape, splits as usize);
        assert!(parts >= y + 4 * FEW * shape.rows() && end <= base + done.bytes, "{launch:?}, {} bytes", done.bytes);
        let remarks = kernels.remarks();
        assert!(remarks[0].contains(&format!("[40,9728] among {splits}")), "{remarks:?}");
    }
}
