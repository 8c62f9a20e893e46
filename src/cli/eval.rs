//! `awqc eval`.

use std::path::PathBuf;

use awqc_passes::remark::counted;
use clap::ArgGroup;

use super::{Context, print_json};
use crate::engine::EngineArgs;
use crate::evaluate::{Against, Evaluation, Watched, evaluate};
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::print;
use crate::tokens::read_ids;

/// Measure perplexity, and the distance from another model.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("evaluated").args(["text", "ids"]).required(true))]
pub(super) struct Args {
    /// The model.
    model: PathBuf,
    /// The text: tokenized whole, no token added, cut into windows that do not overlap.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Token ids in place of a text: `input_ids`, [windows, length], of a safetensors file.
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
    /// Tokens in a window; all but the first are targets.
    #[arg(long, default_value_t = 512, value_name = "N", conflicts_with = "ids")]
    context: usize,
    /// At most so many windows.
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Compare with this model: perplexity ratio, KL divergence, share of equal top tokens.
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
    /// Compare with the model whose logits were saved to this file, without running it.
    #[arg(long, value_name = "FILE", conflicts_with = "against")]
    base_logits: Option<PathBuf>,
    /// Write the model's logits to this file, for --base-logits: 2 bytes for each target and token of the vocabulary.
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// Fail with code 5 if the perplexity is above this.
    #[arg(long, value_name = "X", value_parser = super::number(1.0..=f64::MAX, "a number of 1 or more"))]
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
    if args.chunks == Some(0) {
        return Err(Failure::new(Exit::Usage, "--chunks 0 leaves nothing to evaluate"));
    }
    let model = Model::open(&args.model)?;
    let limit = args.chunks.unwrap_or(usize::MAX);
    let windows: Vec<Vec<i32>> = match (&args.ids, &args.text) {
        (Some(path), _) => read_ids(path)?.into_iter().take(limit).collect(),
        (None, Some(path)) => model.windows(path, args.context, limit)?,
        (None, None) => return Err(Failure::new(Exit::Usage, "give --text or --ids")),
    };
    if windows.is_empty() {
        return Err(Failure::new(Exit::Usage, "there are no windows to evaluate"));
    }
    let against = args.against.as_deref().map(Model::open).transpose()?;
    let reference = match (&against, &args.base_logits) {
        (Some(model), _) => Against::Model(model),
        (None, Some(path)) => Against::Saved(path),
        (None, None) => Against::Nothing,
    };
    if let (Some(base), Some(save)) = (&args.base_logits, &args.save_logits)
        && (base == save || base.canonicalize().is_ok_and(|base| save.canonicalize().is_ok_and(|save| base == save)))
    {
        return Err(Failure::new(Exit::Usage, "--save-logits would replace the base that --base-logits names")
            .help("give another file"));
    }
    let watched = Watched { interrupt: &context.interrupt, quiet: context.quiet };
    let save = args.save_logits.as_deref();
    let found = evaluate(&model, reference, save, &args.engine, context.threads, &windows, watched)?;
    if args.json {
        print_json(&found)?;
    } else {
        print(&table(&found));
    }
    let summary = &found.summary;
    match args.max_perplexity {
        Some(max) if summary.perplexity > max => {
            Err(Failure::new(Exit::Check, format!("the perplexity is {:.3}, above {max}", summary.perplexity)))
        }
        Some(_) | None => Ok(()),
    }
}

fn table(Evaluation { runs_on, summary: s }: &Evaluation) -> String {
    let pm = |error: Option<f64>, digits: usize| error.map_or_else(String::new, |e| format!(" ± {e:.digits$}"));
    let mut out = format!("perplexity      {:.4}{}", s.perplexity, pm(s.perplexity_error, 4));
    out += &format!(" over {} in {}\n", counted(s.tokens, "token"), counted(s.windows, "window"));
    if let Some(d) = &s.distance {
        let ratio = format!("{:.5}{}", d.perplexity_ratio, pm(d.perplexity_ratio_error, 5));
        out += &format!("against         {:.4}, the ratio is {ratio}\n", d.reference_perplexity);
        out += &format!("KL divergence   mean {:.5}{}, ", d.kl_divergence, pm(d.kl_error, 5));
        out += &format!("median {:.5}, 99 % {:.4}, largest {:.3} nats\n", d.kl_median, d.kl_p99, d.kl_max);
        out +=
            &format!("same top token  {:.2}{} %\n", 100.0 * d.top1_agreement, pm(d.top1_error.map(|e| 100.0 * e), 2));
    }
    out += &format!("computed by     {}, activations {}, cache {}\n", runs_on.isa, runs_on.act, runs_on.kv);
    out
}
