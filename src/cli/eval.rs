//! `awqc eval`.

use std::path::PathBuf;

use super::{Context, print_json};
use crate::engine::EngineArgs;
use crate::evaluate::{evaluate, logits, save};
use crate::failure::{Exit, Failure};
use crate::metrics::Summary;
use crate::model::Model;
use crate::progress::print;
use crate::tokens::{read_ids, windows};

/// Measure perplexity, and the distance from another model.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model.
    model: PathBuf,
    /// The text: tokenized whole, no token added, cut into windows that do not overlap.
    #[arg(long, value_name = "FILE", required_unless_present = "ids")]
    text: Option<PathBuf>,
    /// Token ids in place of a text: `input_ids`, [windows, length], of a safetensors file.
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    ids: Option<PathBuf>,
    /// Tokens in a window; all but the first are targets.
    #[arg(long, default_value_t = 512, value_name = "N")]
    context: usize,
    /// At most so many windows.
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Compare with this model: KL divergence, share of equal top tokens.
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
    /// Write the logits, f32 [windows, length, vocabulary], to this file.
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// Fail with code 5 if the perplexity is above this.
    #[arg(long, value_name = "X")]
    max_perplexity: Option<f64>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    if args.context < 2 {
        return Err(Failure::new(Exit::Usage, "a window needs two tokens at least"));
    }
    let model = Model::open(&args.model)?;
    let limit = args.chunks.unwrap_or(usize::MAX);
    let windows: Vec<Vec<i32>> = match (&args.ids, &args.text) {
        (Some(path), _) => read_ids(path)?.into_iter().take(limit).collect(),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
            let tokenizer = model.tokenizer()?.ok_or_else(|| {
                Failure::new(Exit::BadInput, "the model has no tokenizer.json").help("give token ids with --ids")
            })?;
            windows(&tokenizer.encode(&text)?, args.context, limit, &path.display().to_string())?
        }
        (None, None) => return Err(Failure::new(Exit::Usage, "give --text or --ids")),
    };
    if windows.is_empty() {
        return Err(Failure::new(Exit::Usage, "--chunks 0 leaves nothing to evaluate"));
    }
    let against = args.against.as_deref().map(Model::open).transpose()?;
    let summary =
        evaluate(&model, against.as_ref(), &args.engine, context.threads, &windows, &context.interrupt, context.quiet)?;
    if let Some(path) = &args.save_logits {
        let (shape, data) = logits(&model, &args.engine, context.threads, &windows, &context.interrupt, context.quiet)?;
        save(path, "logits", shape, &data)?;
    }
    if args.json {
        print_json(&summary)?;
    } else {
        print(&table(&summary));
    }
    match args.max_perplexity {
        Some(max) if summary.perplexity > max => {
            Err(Failure::new(Exit::Check, format!("the perplexity is {:.3}, above {max}", summary.perplexity)))
        }
        Some(_) | None => Ok(()),
    }
}

fn table(s: &Summary) -> String {
    let mut out = format!("perplexity      {:.4} ± {:.4} over {} tokens\n", s.perplexity, s.perplexity_error, s.tokens);
    if let (Some(kl), Some(median), Some(p99), Some(top)) = (s.kl_divergence, s.kl_median, s.kl_p99, s.top1_agreement) {
        out += &format!("KL divergence   mean {kl:.5}, median {median:.5}, 99 % {p99:.4} nats\n");
        out += &format!("same top token  {:.2} %\n", 100.0 * top);
    }
    out
}
