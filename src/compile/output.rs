//! The emitter of a target's format.

use std::path::Path;

use awqc_exec::emit::{self, EmitError, Emitter, HfAwq, Reference};
use awqc_frontends::{CONFIG, Kind};
use awqc_ir::{Group, Quant};

use super::Request;
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::target::Format;

/// An emitter into `folder`.
///
/// # Errors
/// When the format cannot express the model, or the model lacks what the format wants.
pub(super) fn emitter(request: &Request<'_>, model: &Model, folder: &Path) -> Result<Box<dyn Emitter>, Failure> {
    let extra = model.files.iter().map(|f| Ok(emit::ExtraFile { name: f.name.clone(), bytes: model.read(f)? }));
    let extra = extra.collect::<Result<Vec<_>, Failure>>()?;
    match request.target.format {
        Format::Artefact => {
            let config = serde_json::to_vec_pretty(&model.config).map_err(|e| Failure::new(Exit::Failed, e))?;
            let has = model.config.is_empty() || extra.iter().any(|f| f.name == CONFIG);
            let config = (!has).then(|| emit::ExtraFile { name: CONFIG.into(), bytes: config });
            Ok(Box::new(Reference::new(folder, extra.into_iter().chain(config).collect())))
        }
        Format::HfAwq => {
            if model.config.is_empty() && model.kind == Kind::Onnx {
                let message = "a folder for transformers needs a config.json, and there is none beside the model";
                return Err(Failure::new(Exit::BadInput, format!("{}: {message}", request.model.display()))
                    .help("put the config.json of the exported model there, or give another target"));
            }
            if request.pipeline.is_none()
                && let Err(error) = emit::check(&model.module, request.quant)
            {
                let fits = |g: &u32| {
                    let quant = Quant { group: Group::Size(*g), ..request.quant };
                    emit::check(&model.module, quant).is_ok()
                };
                let failure = emit_failure(error);
                return Err(match [128, 64, 32, 16].iter().find(|g| fits(g)) {
                    Some(g) => failure.help(format!("give --group {g}")),
                    None => failure,
                });
            }
            Ok(Box::new(HfAwq::new(folder, model.config.clone(), extra)))
        }
    }
}

/// What an emitter's error means.
pub(super) fn emit_failure(error: EmitError) -> Failure {
    match error {
        EmitError::Exists(_) => {
            Failure::new(Exit::Usage, error).help("give another folder with -o, or --force to replace it")
        }
        EmitError::Foreign(_) => {
            Failure::new(Exit::Usage, error).help("give another folder with -o, or remove that one yourself")
        }
        EmitError::Name(_) => Failure::new(Exit::Usage, error).help("give the new folder's name with -o"),
        EmitError::Io { .. } | EmitError::Duplicate(_) => Failure::new(Exit::Failed, error),
        EmitError::Unsupported(_) | EmitError::Layout { .. } => Failure::new(Exit::Unsupported, error),
        EmitError::Exec(error) => error.into(),
    }
}
