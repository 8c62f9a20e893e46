//! A plan at work on a device: weights in place, caches and activations allocated, kernels loaded.

use std::collections::BTreeMap;
use std::ops::Range;

use awqc_exec::Logits;
use awqc_exec::eye::rows_of;
use awqc_exec::interp::frequencies::frequencies;
use awqc_exec::interp::ops::image::places;
use awqc_ir::images::Placed;
use awqc_ir::{Stored, TensorSource};
use awqc_passes::Tensor;
use half::{bf16, f16};

use crate::CudaError;
use crate::arch::Arch;
use crate::driver::{Address, Buffer, Device, Function, Graph, Launch};
use crate::kernels::Call;
use crate::kernels::rows::NO_IMAGE;
use crate::plan::{FEW, Form, Given, Ints, Launch as Planned, Part, Place, Plan};

/// Where a plan's constants begin in the buffer of weights: multiples of so many bytes.
const ALIGN: usize = 256;

/// A model on a device and the state of one sequence.
pub struct Session {
    plan: Plan,
    device: Device,
    functions: Vec<Function>,
    /// All constants, and where each begins.
    weights: Buffer,
    constants: Vec<usize>,
    arena: Buffer,
    caches: Vec<Buffer>,
    /// What comes with a call, for few and for many tokens.
    given: [Inputs; 2],
    /// The launches of one token, for each [`Next`].
    steps: [Option<Issue>; 3],
    /// Why the driver did not capture them.
    uncaptured: Option<String>,
    /// What the model's eye made of the images at hand.
    images: Option<Seen>,
    context: usize,
    past: usize,
}

/// Rows of images on the device.
struct Seen {
    images: usize,
    /// Rows of an image.
    rows: usize,
    buffer: Buffer,
}

/// How the launches of a token are issued.
enum Issue {
    /// At once.
    Graph(Graph),
    /// One by one, for the driver cannot capture them.
    Each,
}

/// What becomes of a token's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// They are downloaded.
    Logits = 0,
    /// The device looks for the largest.
    Choice = 1,
    /// The device looks for the largest ones.
    Top = 2,
}

/// Memory for what comes with a call.
struct Inputs {
    buffer: Buffer,
    bytes: Vec<u8>,
    places: Vec<(Given, Range<usize>)>,
}

impl Session {
    /// Brings a model to a device. `image` gives the machine code, or PTX, of a kernel.
    ///
    /// # Errors
    /// When the plan is damaged, the device is of another architecture or has too little memory, or a tensor is
    /// missing.
    pub fn new(
        plan: Plan,
        source: &dyn TensorSource,
        mut image: impl FnMut(&str) -> Result<Vec<u8>, CudaError>,
        device: Device,
        context: usize,
    ) -> Result<Self, CudaError> {
        plan.check().map_err(CudaError::Artefact)?;
        let arch = Arch::find(plan.arch)?;
        if !arch.runs_on(device.capability()) {
            return Err(CudaError::OtherArch {
                kernels: arch.name(),
                device: device.name().to_owned(),
                capability: device.capability(),
            });
        }
        let context = context.max(1);
        let mut functions = Vec::new();
        for kernel in &plan.kernels {
            let code = device.load(&image(&kernel.name)?)?;
            functions.push(device.function(&code, &kernel.name, kernel.shared_bytes)?);
        }
        let mut constants = Vec::new();
        let mut end = 0usize;
        for constant in &plan.constants {
            constants.push(end);
            end = (end + bytes_of(source, &constant.tensor, constant.form)?).next_multiple_of(ALIGN);
        }
        let weights = device.alloc("the weights", end)?;
        for (constant, at) in plan.constants.iter().zip(&constants) {
            upload(&device, &weights, *at, source, &constant.tensor, constant.form)?;
        }
        let arena = device.alloc("the activations", plan.arena_bytes)?;
        let cache = |bytes: &usize| {
            let bytes = bytes.checked_mul(context);
            let bytes = bytes.ok_or(CudaError::Context { needed: context, room: 0 })?;
            device.alloc(&format!("a KV cache for {context} positions"), bytes)
        };
        let caches = plan.caches.iter().map(cache).collect::<Result<Vec<_>, _>>()?;
        let given = [Inputs::new(&plan, &device, FEW)?, Inputs::new(&plan, &device, plan.chunk)?];
        let mut session = Self {
            plan,
            device,
            functions,
            weights,
            constants,
            arena,
            caches,
            given,
            steps: [None, None, None],
            uncaptured: None,
            images: None,
            context,
            past: 0,
        };
        session.capture(Next::Logits);
        Ok(session)
    }

    /// Positions that have been seen since the last reset.
    pub fn position(&self) -> usize {
        self.past
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of device memory that the model takes.
    pub fn device_bytes(&self) -> usize {
        let fixed = [&self.weights, &self.arena, &self.given[0].buffer, &self.given[1].buffer];
        let images = self.images.iter().map(|seen| &seen.buffer);
        fixed.into_iter().chain(&self.caches).chain(images).map(Buffer::bytes).sum()
    }

    /// Begins a text with images: what the model's eye made of them, `[images, rows, channels]`; see
    /// [`awqc_exec::Eye`].
    ///
    /// # Errors
    /// When the model takes none, or others, and when the device fails.
    pub fn see(&mut self, images: &Tensor) -> Result<(), CudaError> {
        self.reset();
        let (count, rows) = rows_of(self.plan.images, images).map_err(CudaError::Images)?;
        let bytes: Vec<u8> = images.data.iter().flat_map(|v| v.to_le_bytes()).collect();
        let buffer = self.device.alloc("the images", bytes.len())?;
        self.device.upload(&buffer, 0, &bytes)?;
        self.hold(Some(Seen { images: count, rows, buffer }));
        Ok(())
    }

    /// Why the launches of a token are issued one by one, which is slower, and not as a graph; nothing if they are one.
    pub fn uncaptured(&self) -> Option<&str> {
        self.uncaptured.as_deref()
    }

    /// Forgets all earlier positions, and the images.
    pub fn reset(&mut self) {
        self.past = 0;
        if self.images.is_some() {
            self.hold(None);
        }
    }

    /// Other images, or none: launches that were captured have the address of those before.
    fn hold(&mut self, images: Option<Seen>) {
        self.images = images;
        self.steps = [None, None, None];
    }

    /// The logits of `ids`, which continue what the session has seen since the last reset: `[ids, vocabulary]`, or
    /// `[1, vocabulary]` for the last one.
    ///
    /// # Errors
    /// When the sequence would be longer than the caches, an id is outside the embedding table, or the text has places
    /// for more or fewer images, before anything is computed; and when the device fails.
    pub fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, CudaError> {
        let places = self.check(ids)?;
        let mut data = Vec::new();
        let length = self.past + ids.len();
        for (i, chunk) in ids.chunks(self.plan.chunk.max(1)).enumerate() {
            let last = (i + 1) * self.plan.chunk.max(1) >= ids.len();
            let wanted = match logits {
                Logits::All => 0..chunk.len(),
                Logits::Last if last => chunk.len() - 1..chunk.len(),
                Logits::Last => 0..0,
            };
            self.give(chunk, places.get(i * self.plan.chunk.max(1)..).unwrap_or_default(), length)?;
            if chunk.len() == 1 && wanted.len() == 1 {
                self.token(Next::Logits)?;
                self.read(1, &mut data)?;
            } else {
                self.part(&self.plan.body, chunk.len(), chunk.len(), 0)?;
                for start in wanted.clone().step_by(self.plan.head_chunk.max(1)) {
                    let count = self.plan.head_chunk.max(1).min(wanted.end - start);
                    self.count(chunk.len(), count)?;
                    self.part(&self.plan.head, chunk.len(), count, start)?;
                    self.read(count, &mut data)?;
                }
            }
            self.past += chunk.len();
        }
        let vocabulary = self.plan.vocabulary;
        Ok(Tensor { shape: vec![data.len() / vocabulary.max(1), vocabulary], data })
    }

    /// The token with the largest logit behind `id`, which continues what the session has seen: four bytes come back
    /// from the device instead of all logits.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn next(&mut self, id: i32) -> Result<i32, CudaError> {
        let places = self.check(&[id])?;
        self.give(&[id], &places, self.past + 1)?;
        self.token(Next::Choice)?;
        let mut bytes = [0; 4];
        self.device.download(&self.arena, self.plan.chosen, &mut bytes)?;
        self.past += 1;
        Ok(i32::from_le_bytes(bytes))
    }

    /// The `count` largest logits behind `id`, which continues what the session has seen, and the tokens that they
    /// belong to: larger ones first, as [`f32::total_cmp`] orders them, and of equals the smaller token. Nothing, and
    /// nothing is computed, if the device does not look for so many, or all logits are asked for.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn largest(&mut self, id: i32, count: usize) -> Result<Option<Vec<(usize, f32)>>, CudaError> {
        let kept = self.plan.top.count;
        if count > kept || count >= self.plan.vocabulary {
            return Ok(None);
        }
        let places = self.check(&[id])?;
        self.give(&[id], &places, self.past + 1)?;
        self.token(Next::Top)?;
        let mut bytes = vec![0; 8 * kept];
        self.device.download(&self.arena, self.plan.top.found, &mut bytes)?;
        self.past += 1;
        let (values, ids) = bytes.split_at(4 * kept);
        let pairs = ids.as_chunks::<4>().0.iter().zip(values.as_chunks::<4>().0);
        Ok(Some(pairs.take(count).map(|(id, v)| (u32::from_le_bytes(*id) as usize, f32::from_le_bytes(*v))).collect()))
    }

    /// Seconds that the launches of one token take on the device, at the current position, again and again.
    ///
    /// # Errors
    /// When the device fails.
    pub fn time_token(&mut self, id: i32, repeats: usize) -> Result<f64, CudaError> {
        let places = self.check(&[id])?;
        self.give(&[id], &places, self.past + 1)?;
        self.token(Next::Choice)?;
        self.device.synchronize()?;
        let seconds = self.device.time(|| (0..repeats).try_for_each(|_| self.launch_token(Next::Choice)))?;
        Ok(seconds / repeats.max(1) as f64)
    }

    /// Whether these tokens can go on here, and the rows of images that stand at them: none if no image does.
    fn check(&self, ids: &[i32]) -> Result<Vec<Option<usize>>, CudaError> {
        let needed = self.past + ids.len();
        if needed > self.context {
            return Err(CudaError::Context { needed, room: self.context });
        }
        for table in &self.plan.tables {
            let row = |id: i64| usize::try_from(id + i64::from(table.offset)).is_ok_and(|row| row < table.rows);
            let bad = match table.of {
                Ints::Ids => ids.iter().map(|id| i64::from(*id)).find(|id| !row(*id)),
                Ints::Positions => Some(needed as i64 - 1).filter(|last| !row(*last)),
            };
            if let Some(id) = bad {
                return Err(CudaError::Index { id, rows: table.rows });
            }
        }
        let Some(Placed { token, .. }) = self.plan.images else { return Ok(Vec::new()) };
        let there = self.images.as_ref().map_or((0, 0), |seen| (seen.images, seen.rows));
        places(token, ids, there).map_err(CudaError::Images)
    }

    /// Index of the inputs for so many tokens.
    fn inputs(tokens: usize) -> usize {
        usize::from(tokens > FEW)
    }

    /// Uploads what comes with a call. `length` is that of the sequence when the whole call is done.
    fn give(&mut self, ids: &[i32], places: &[Option<usize>], length: usize) -> Result<(), CudaError> {
        let past = self.past;
        let inputs = &mut self.given[Self::inputs(ids.len())];
        let mut angles: BTreeMap<usize, (Vec<f64>, f64)> = BTreeMap::new();
        for (given, range) in &inputs.places {
            let bytes = &mut inputs.bytes[range.clone()];
            let mut put = |i: usize, word: [u8; 4]| bytes[4 * i..4 * i + 4].copy_from_slice(&word);
            match given {
                Given::Call => {
                    put(Call::Tokens as usize, (ids.len() as u32).to_le_bytes());
                    put(Call::Past as usize, (past as u32).to_le_bytes());
                }
                Given::Ints(Ints::Ids) => ids.iter().enumerate().for_each(|(i, id)| put(i, id.to_le_bytes())),
                Given::Ints(Ints::Positions) => {
                    (0..ids.len()).for_each(|i| put(i, ((past + i) as u32).to_le_bytes()));
                }
                Given::Places => (0..ids.len()).for_each(|i| {
                    let row = places.get(i).copied().flatten().and_then(|row| u32::try_from(row).ok());
                    put(i, row.unwrap_or(NO_IMAGE).to_le_bytes());
                }),
                Given::Cos(at) | Given::Sin(at) => {
                    let table = &self.plan.angles[*at];
                    let (turns, factor) = angles.entry(*at).or_insert_with(|| frequencies(table, length as u64));
                    let pairs = turns.len();
                    let f = if matches!(given, Given::Cos(_)) { f64::cos } else { f64::sin };
                    for (t, (j, turn)) in (0..ids.len()).flat_map(|t| turns.iter().enumerate().map(move |p| (t, p))) {
                        let value = f((past + t) as f64 * turn) * *factor;
                        put(t * pairs + j, (value as f32).to_le_bytes());
                    }
                }
            }
        }
        self.device.upload(&inputs.buffer, 0, &inputs.bytes)
    }

    /// Tells the head how many tokens it has.
    fn count(&self, tokens: usize, count: usize) -> Result<(), CudaError> {
        let inputs = &self.given[Self::inputs(tokens)];
        let call = inputs.places.iter().find(|(g, _)| *g == Given::Call).map_or(0, |(_, r)| r.start);
        self.device.upload(&inputs.buffer, call + 4 * Call::Tokens as usize, &(count as u32).to_le_bytes())
    }

    /// The launches of one token, body and head.
    fn token(&mut self, next: Next) -> Result<(), CudaError> {
        if self.steps[next as usize].is_none() {
            self.capture(next);
        }
        self.launch_token(next)
    }

    /// Makes a graph of a token's launches, where the driver can.
    fn capture(&mut self, next: Next) {
        let issue = match self.device.capture(|| self.launches(next)) {
            Ok(graph) => Issue::Graph(graph),
            Err(error) => {
                self.uncaptured = Some(error.to_string());
                Issue::Each
            }
        };
        self.steps[next as usize] = Some(issue);
    }

    fn launch_token(&self, next: Next) -> Result<(), CudaError> {
        match &self.steps[next as usize] {
            Some(Issue::Graph(graph)) => self.device.replay(graph),
            Some(Issue::Each) | None => self.launches(next),
        }
    }

    fn launches(&self, next: Next) -> Result<(), CudaError> {
        self.run(&self.plan.body.few, 1, 1, 0)?;
        self.run(&self.plan.head.few, 1, 1, 0)?;
        match next {
            Next::Logits => Ok(()),
            Next::Choice => self.run(std::slice::from_ref(&self.plan.choice), 1, 1, 0),
            Next::Top => self.run(&self.plan.top.launches, 1, 1, 0),
        }
    }

    /// Launches a part for `count` of the call's `tokens` tokens, from `start` on.
    fn part(&self, part: &Part, tokens: usize, count: usize, start: usize) -> Result<(), CudaError> {
        self.run(if count > FEW { &part.many } else { &part.few }, tokens, count, start)
    }

    fn run(&self, launches: &[Planned], tokens: usize, count: usize, start: usize) -> Result<(), CudaError> {
        let inputs = &self.given[Self::inputs(tokens)];
        let mut args: Vec<Address> = Vec::new();
        for launch in launches {
            args.clear();
            args.extend(launch.args.iter().map(|place| self.address(place, inputs, start)));
            let kernel = &self.plan.kernels[launch.kernel];
            self.device.launch(&Launch {
                function: &self.functions[launch.kernel],
                grid: launch.grid.map(|e| e.blocks(count)),
                threads: kernel.threads,
                shared_bytes: kernel.shared_bytes,
                args: &args,
            })?;
        }
        Ok(())
    }

    fn address(&self, place: &Place, inputs: &Inputs, start: usize) -> Address {
        match place {
            Place::Constant(i) => self.weights.address() + self.constants[*i] as Address,
            Place::Arena(at) => self.arena.address() + *at as Address,
            Place::Stream(at, row) => self.arena.address() + (at + start * row) as Address,
            Place::Cache(i) => self.caches[*i].address(),
            // Nothing reads there without images.
            Place::Images => self.images.as_ref().map_or(0, |seen| seen.buffer.address()),
            Place::Given(given) => {
                let at = inputs.places.iter().find(|(g, _)| g == given).map_or(0, |(_, range)| range.start);
                inputs.buffer.address() + at as Address
            }
        }
    }

    /// Appends the logits of `count` tokens.
    fn read(&self, count: usize, out: &mut Vec<f32>) -> Result<(), CudaError> {
        let mut bytes = vec![0u8; count * self.plan.vocabulary * 4];
        self.device.download(&self.arena, self.plan.logits, &mut bytes)?;
        out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        Ok(())
    }
}

impl Inputs {
    fn new(plan: &Plan, device: &Device, tokens: usize) -> Result<Self, CudaError> {
        let mut places = Vec::new();
        let mut end = 0;
        for (given, bytes) in plan.given(tokens) {
            places.push((given, end..end + bytes));
            end += bytes;
        }
        Ok(Self { buffer: device.alloc("the inputs of a call", end)?, bytes: vec![0; end], places })
    }
}

fn missing(tensor: &str) -> CudaError {
    CudaError::Artefact(format!("tensor `{tensor}` is missing: compile the model again"))
}

/// Bytes of a constant on the device.
fn bytes_of(source: &dyn TensorSource, tensor: &str, form: Form) -> Result<usize, CudaError> {
    let info = source.info(tensor).ok_or_else(|| missing(tensor))?;
    let count = info.shape.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).ok_or_else(|| missing(tensor))?;
    let size = match form {
        Form::Stored => info.stored.size(),
        Form::F32 { .. } => 4,
    };
    count.checked_mul(size).ok_or_else(|| missing(tensor))
}

fn upload(
    device: &Device,
    weights: &Buffer,
    at: usize,
    source: &dyn TensorSource,
    tensor: &str,
    form: Form,
) -> Result<(), CudaError> {
    let Form::F32 { add } = form else {
        if let Some(bytes) = source.mapped(tensor) {
            return device.upload(weights, at, bytes);
        }
        let raw = source.read(tensor).map_err(|e| CudaError::Artefact(e.0))?;
        return device.upload(weights, at, &raw.bytes);
    };
    let raw = source.read(tensor).map_err(|e| CudaError::Artefact(e.0))?;
    let values: Vec<f32> = match raw.info.stored {
        Stored::F32 => raw.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Stored::F16 => raw.bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Stored::Bf16 => raw.bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => {
            return Err(CudaError::Artefact(format!("tensor `{tensor}` is no parameter: it is {}", raw.info.stored)));
        }
    };
    let bytes: Vec<u8> = values.iter().flat_map(|v| (v + add).to_le_bytes()).collect();
    device.upload(weights, at, &bytes)
}
