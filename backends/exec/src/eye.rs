//! What a model sees images with: the regions that take pixels, and what becomes of them, alone.

use awqc_ir::images::{Placed, takes_pixels};
use awqc_ir::{FusedDef, Region, TensorSource, Verified};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::Device;

use crate::chain::no_images;
use crate::host::Host;
use crate::interp::{ExecBackend, Interpreter, Val, Weights};

/// What is shown the first value of the stream at the exit of a region.
pub type Observer<'a> = dyn FnMut(&Region, Tensor) -> Result<(), ExecError> + 'a;

/// The eye of a module ([`awqc_ir::Module::eye`]), its weights decoded. It has no state: it looks at each image once,
/// and whoever runs the text keeps what it made of them.
pub struct Eye<B: ExecBackend = Host> {
    regions: Vec<(Region, Weights<B>)>,
    fused: Vec<FusedDef>,
    device: Device<B>,
    pixels: [u64; 3],
}

impl<B: ExecBackend> Eye<B> {
    /// Reads and decodes the weights of the module's eye; nothing for a module that takes text alone.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn open(module: Verified<'_>, source: &dyn TensorSource, device: Device<B>) -> Result<Option<Self>, ExecError> {
        let (regions, _) = module.eye_and_text();
        let Some(pixels) = regions.first().and_then(takes_pixels) else { return Ok(None) };
        let load = |region: &Region| Ok((region.clone(), Weights::load(region, source, &device)?));
        let regions = regions.iter().map(load).collect::<Result<_, ExecError>>()?;
        Ok(Some(Self { regions, fused: module.fused.clone(), device, pixels }))
    }

    /// What the eye makes of images, `pixels: [N,C,H,W]`: their rows, `[N,P,C]`. `observe` is shown what each region
    /// makes of them.
    ///
    /// # Errors
    /// When the model takes other images than these; and what `observe` returns.
    pub fn see(&self, pixels: Tensor, observe: &mut Observer<'_>) -> Result<Val<B>, ExecError> {
        self.look(Val::floats(pixels, &self.device), |region, seen| observe(region, seen.to_tensor()?))
    }

    /// What it makes of no image.
    pub(crate) fn blink(&self) -> Result<Val<B>, ExecError> {
        self.look(no_images(self.pixels), |_, _| Ok(()))
    }

    fn look(
        &self,
        mut images: Val<B>,
        mut observe: impl FnMut(&Region, &Val<B>) -> Result<(), ExecError>,
    ) -> Result<Val<B>, ExecError> {
        let interpreter = Interpreter::<B> { fused: &self.fused, device: &self.device };
        for (region, weights) in &self.regions {
            let out = interpreter.run(region, weights, vec![images], None, &mut |_, _| Ok(()))?;
            let nothing = || ExecError::Tensor(format!("region {} returns nothing", region.name));
            images = out.into_iter().next().ok_or_else(nothing)?;
            observe(region, &images)?;
        }
        Ok(images)
    }
}

/// How many images these are and how many rows each has, `[images, rows, channels]`, for who puts them into a text.
///
/// # Errors
/// When the text takes none, or rows of another width.
pub fn rows_of(takes: Option<Placed>, images: &Tensor) -> Result<(usize, usize), String> {
    let takes = takes.ok_or("the model takes text alone, no images")?;
    match images.shape.as_slice() {
        [count, rows, width] if *width == takes.width => Ok((*count, *rows)),
        shape => Err(format!("images are [images,rows,{}] here, these are {shape:?}", takes.width)),
    }
}
