//! What runs a model: packed weights by the CPU's kernels, kernels for a device by the device, everything else by the
//! reference executor, on the processor or, through burn-cuda, on the device.

use awqc_cpu::{Activations, CacheNumbers, CpuError, Isa, Options, Pages};
use awqc_exec::{Eye, Host, Logits, Session};
use awqc_ir::verify::verify;
use awqc_ir::{Layout, WeightExpr};
use awqc_passes::Tensor;

use crate::burn::Burn;
use crate::device::has_kernels;
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::progress::say;
use crate::target::Target;

/// What computes, and with which numbers.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RunsOn {
    /// The instruction set, the device, or the executor.
    pub isa: String,
    /// What linears multiply.
    pub act: &'static str,
    /// What keys and values of earlier positions are kept as.
    pub kv: &'static str,
}

impl RunsOn {
    /// The reference meaning on the processor.
    pub fn reference() -> Self {
        Self { isa: "reference".into(), act: "f32", kv: "f32" }
    }

    /// The CPU kernels.
    pub fn cpu(session: &awqc_cpu::Session<'_>) -> Self {
        let options = session.options();
        let act = if session.has_packed_weights() { options.activations } else { Activations::F32 };
        Self { isa: options.isa.name().into(), act: act.name(), kv: options.cache.name() }
    }

    /// The kernels of a CUDA artefact.
    pub fn cuda(session: &awqc_cuda::Session) -> Self {
        Self { isa: session.device().name().into(), act: "f16", kv: "f16" }
    }
}

/// A model that continues one sequence.
pub trait Engine {
    /// What computes.
    fn runs_on(&self) -> RunsOn;

    /// The logits of `ids`, which continue what has been seen since the last reset: `[…, vocabulary]`.
    ///
    /// # Errors
    /// When there is no room for more positions, or an id is outside the vocabulary.
    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, Failure>;

    /// The token with the largest logit behind `id`, where the engine finds it without handing out the logits.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    fn likeliest(&mut self, _id: i32) -> Result<Option<i32>, Failure> {
        Ok(None)
    }

    /// The `count` largest logits behind `id` and their tokens, in the order of [`crate::sample::Sampling::draw`],
    /// where the engine finds them without handing out all logits. Nothing, and nothing is computed, where it does not.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    fn largest(&mut self, _id: i32, _count: usize) -> Result<Option<Vec<(usize, f32)>>, Failure> {
        Ok(None)
    }

    /// Begins a text with images, `[N,C,H,W]`.
    ///
    /// # Errors
    /// When the model takes none, or others.
    fn see(&mut self, pixels: Tensor) -> Result<(), Failure>;

    /// Forgets all earlier positions, and images.
    fn reset(&mut self);
}

impl Engine for Session<Host> {
    fn runs_on(&self) -> RunsOn {
        RunsOn::reference()
    }

    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, Failure> {
        Ok(Self::forward(self, ids, logits)?)
    }

    fn see(&mut self, pixels: Tensor) -> Result<(), Failure> {
        Ok(Self::see(self, pixels, &mut |_, _| Ok(()))?)
    }

    fn reset(&mut self) {
        Self::reset(self);
    }
}

/// A text by kernels, and a model whose eye looks at images: on the processor, in f32.
struct WithEye<'m, S> {
    session: S,
    model: &'m Model,
}

impl<S> WithEye<'_, S> {
    /// What the eye makes of images. Its weights are read, and given up again: there is one text with these images.
    fn look(&self, pixels: Tensor) -> Result<Tensor, Failure> {
        let module = verify(&self.model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
        let eye = Eye::<Host>::open(module, self.model.source.as_ref(), Default::default())?;
        let eye = eye.ok_or_else(|| Failure::new(Exit::Usage, "the model takes text alone, no images"))?;
        Ok(eye.see(pixels, &mut |_, _| Ok(()))?.to_tensor()?)
    }
}

impl Engine for WithEye<'_, awqc_cpu::Session<'_>> {
    fn runs_on(&self) -> RunsOn {
        RunsOn::cpu(&self.session)
    }

    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, Failure> {
        Ok(self.session.forward(ids, logits)?)
    }

    fn see(&mut self, pixels: Tensor) -> Result<(), Failure> {
        Ok(self.session.see(self.look(pixels)?)?)
    }

    fn reset(&mut self) {
        self.session.reset();
    }
}

impl Engine for WithEye<'_, awqc_cuda::Session> {
    fn runs_on(&self) -> RunsOn {
        RunsOn::cuda(&self.session)
    }

    fn likeliest(&mut self, id: i32) -> Result<Option<i32>, Failure> {
        Ok(Some(self.session.next(id)?))
    }

    fn largest(&mut self, id: i32, count: usize) -> Result<Option<Vec<(usize, f32)>>, Failure> {
        Ok(self.session.largest(id, count)?)
    }

    fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, Failure> {
        Ok(self.session.forward(ids, logits)?)
    }

    fn see(&mut self, pixels: Tensor) -> Result<(), Failure> {
        Ok(self.session.see(&self.look(pixels)?)?)
    }

    fn reset(&mut self) {
        self.session.reset();
    }
}

/// Where a model runs that is not compiled for processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Where {
    /// On the CUDA device: by the model's kernels, or, if it has none, by burn-cuda in f32.
    Cuda,
    /// On the processor, weights decoded to f32: slow.
    Host,
}

/// How to run a model, as the command line says it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EngineArgs {
    /// Positions to make room for; what is needed if not given.
    #[arg(long, value_name = "N")]
    pub ctx: Option<usize>,
    /// What packed linears multiply: activations rounded to 8 bits or to bf16, or exact ones. The default is int8, and
    /// with amx bf16: bf16 for prompts, int8 for few tokens.
    #[arg(long, value_name = "int8|bf16|f32", value_parser = activations)]
    pub act: Option<Activations>,
    /// Where packed weights live: copied to huge pages, which is the default and decodes large models faster, or in the
    /// mapped file, which loads faster and is shared between processes.
    #[arg(long, value_name = "huge|map", value_parser = pages)]
    pub pages: Option<Pages>,
    /// What keys and values of earlier positions are kept as: f16, which is the default, or f32, which is that of --act
    /// f32.
    #[arg(long, value_name = "f16|f32", value_parser = cache)]
    pub kv: Option<CacheNumbers>,
    /// The instruction set of the packed kernels; the best that the machine and the model's target have if not given.
    #[arg(long, value_name = "ISA")]
    pub isa: Option<Isa>,
    /// Where a model with CUDA kernels runs: on the device, which is the default, or on the processor, which is slow. A
    /// `reference` model or one of floats runs on the processor unless `cuda` is given: then in f32 on the device, which
    /// needs a build with the feature burn-cuda.
    #[arg(long, value_name = "cuda|host")]
    pub device: Option<Where>,
}

fn activations(text: &str) -> Result<Activations, String> {
    let found = Activations::ALL.into_iter().find(|act| act.name() == text);
    found.ok_or_else(|| format!("`{text}`: int8, bf16 or f32 is needed"))
}

fn cache(text: &str) -> Result<CacheNumbers, String> {
    let found = CacheNumbers::ALL.into_iter().find(|numbers| numbers.name() == text);
    found.ok_or_else(|| format!("`{text}`: f16 or f32 is needed"))
}

fn pages(text: &str) -> Result<Pages, String> {
    match text {
        "map" => Ok(Pages::Map),
        "huge" => Ok(Pages::Huge),
        other => Err(format!("`{other}`: huge or map is needed")),
    }
}

impl EngineArgs {
    /// An error if something is asked of the packed kernels, which do not run the model.
    ///
    /// # Errors
    /// Then.
    pub fn refuse(&self) -> Result<(), Failure> {
        self.refuse_device()?;
        let given = [
            ("--ctx", self.ctx.is_some()),
            ("--act", self.act.is_some()),
            ("--pages", self.pages.is_some()),
            ("--kv", self.kv.is_some()),
            ("--isa", self.isa.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Failure::new(
                Exit::Usage,
                format!("{flag} is for models with packed weights, which this one does not have"),
            )
            .help("leave it out, or compile the model for a CPU target: --target cpu-native")),
            None => Ok(()),
        }
    }

    /// An error if a device is asked for, and the model has no kernels for one.
    ///
    /// # Errors
    /// Then.
    pub fn refuse_device(&self) -> Result<(), Failure> {
        match self.device {
            Some(Where::Cuda) => Err(Failure::new(Exit::Usage, "--device cuda: the model has no kernels for a device")
                .help("compile it with --target cuda-sm80, cuda-sm86, cuda-sm89, cuda-sm90, or reference")),
            Some(Where::Host) | None => Ok(()),
        }
    }
}

/// Whether a device runs this model by kernels of the model's own.
pub fn on_device(model: &Model, args: &EngineArgs) -> bool {
    args.device != Some(Where::Host) && has_kernels(model)
}

/// Whether a device is to run this model, which has no kernels for it, by burn-cuda.
pub fn by_burn(model: &Model, args: &EngineArgs) -> bool {
    args.device == Some(Where::Cuda) && !has_kernels(model) && !packed(model)
}

/// The model on the device.
///
/// # Errors
/// When there is no device that can run it, or something is asked for that only processors have.
pub fn device(model: &Model, args: &EngineArgs, context: usize) -> Result<awqc_cuda::Session, Failure> {
    refuse_processors(args)?;
    let session = crate::device::session(model, args.ctx.unwrap_or(context))?;
    if let Some(why) = session.uncaptured() {
        say(&format!("warning: the driver makes no graph of a token's launches, so each is issued by itself ({why})"));
    }
    Ok(session)
}

/// The model on the device, by burn-cuda.
///
/// # Errors
/// As [`device()`], and when the build lacks burn-cuda.
pub fn burn(model: &Model, args: &EngineArgs) -> Result<Burn, Failure> {
    refuse_processors(args)?;
    crate::burn::session(model)
}

/// An error if something is asked for that only processors have.
fn refuse_processors(args: &EngineArgs) -> Result<(), Failure> {
    let given = [
        ("--act", args.act.is_some()),
        ("--pages", args.pages.is_some()),
        ("--kv", args.kv.is_some()),
        ("--isa", args.isa.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(Failure::new(Exit::Usage, format!("{flag} is for models that run on the processor"))
            .help("leave it out, or compile the model for a CPU target: --target cpu-native")),
        None => Ok(()),
    }
}

/// Whether packed kernels run this model: some of its weights are in their layout.
pub fn packed(model: &Model) -> bool {
    model.module.regions.iter().any(|region| {
        region.weight_ids().any(|id| matches!(region.weight(id).expr, WeightExpr::Packed { layout: Layout::R16, .. }))
    })
}

fn target(model: &Model) -> Option<&'static Target> {
    Target::find(model.target.as_deref()?).ok()
}

/// The engine for a model, with room for `context` positions unless `args` say otherwise.
///
/// # Errors
/// When the module is invalid or a tensor cannot be read.
pub fn engine<'m>(
    model: &'m Model,
    args: &EngineArgs,
    context: usize,
    threads: usize,
    interrupt: &Interrupt,
) -> Result<Box<dyn Engine + 'm>, Failure> {
    if on_device(model, args) {
        return Ok(Box::new(WithEye { session: device(model, args, context)?, model }));
    }
    if by_burn(model, args) {
        return Ok(Box::new(burn(model, args)?));
    }
    if packed(model) {
        args.refuse_device()?;
        let session = cpu(model, args, context, threads)?.with_interrupt(interrupt.flag());
        return Ok(Box::new(WithEye { session, model }));
    }
    args.refuse()?;
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    Ok(Box::new(Session::<Host>::new(module, model.source.as_ref(), Default::default())?))
}

/// As [`engine`], the packed kernels in any case: weights that are not packed are multiplied as they are.
///
/// # Errors
/// As there, and when the machine lacks the instruction set that is asked for.
pub fn cpu<'m>(
    model: &'m Model,
    args: &EngineArgs,
    context: usize,
    threads: usize,
) -> Result<awqc_cpu::Session<'m>, Failure> {
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    let wanted = target(model).and_then(|t| t.cpu).and_then(|cpu| cpu.isa);
    let isa = match (args.isa, wanted) {
        (Some(isa), _) => isa,
        (None, Some(isa)) if isa.is_available() => isa,
        (None, Some(isa)) => {
            let found = Isa::detect();
            say(&format!(
                "warning: the model was compiled for {isa}, which this machine lacks; its kernels for {found} run it"
            ));
            found
        }
        (None, None) => Isa::detect(),
    };
    let activations = args.act.unwrap_or(Activations::fastest(isa));
    let exact = if activations == Activations::F32 { CacheNumbers::F32 } else { CacheNumbers::F16 };
    let options = Options {
        context: args.ctx.unwrap_or(context),
        threads,
        isa,
        activations,
        pages: args.pages.unwrap_or_default(),
        cache: args.kv.unwrap_or(exact),
    };
    let session = awqc_cpu::Session::new(module, model.source.as_ref(), options)?;
    if !session.has_packed_weights() {
        EngineArgs { ctx: None, ..args.clone() }.refuse()?;
    }
    Ok(session)
}

impl From<CpuError> for Failure {
    fn from(error: CpuError) -> Self {
        match error {
            CpuError::Exec(e) => e.into(),
            CpuError::Unsupported(_) => Self::new(Exit::Unsupported, error),
            CpuError::Feature(_) => {
                let have: Vec<&str> = Isa::available().iter().map(|i| i.name()).collect();
                Self::new(Exit::Unsupported, error).help(format!("it has {}", have.join(", ")))
            }
            CpuError::Interrupted => Self::interrupted(),
            CpuError::Memory { .. } => Self::new(Exit::Memory, error).help("ask for less room with --ctx"),
            CpuError::Bf16(_) => Self::new(Exit::Usage, error).help("leave out --act, or --isa"),
            CpuError::Context { .. } => {
                Self::new(Exit::Usage, error).help("make room with --ctx, or give a shorter prompt")
            }
            CpuError::Images(_) => Self::new(Exit::BadInput, error),
            CpuError::Empty => Self::new(Exit::Usage, error),
            CpuError::Index { .. } => Self::new(Exit::BadInput, error).help("is the tokenizer that of this model?"),
        }
    }
}
