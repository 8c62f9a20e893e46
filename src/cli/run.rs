//! `awqc run`: a prompt in, text out, token by token.

use std::path::PathBuf;

use awqc_passes::remark::counted;
use clap::ArgGroup;
use serde_json::Value as Json;

use super::{Context, print_json};
use crate::chat::{Content, Turn, render};
use crate::engine::{EngineArgs, engine};
use crate::failure::{Exit, Failure};
use crate::generate::{Settings, generate};
use crate::images::{MARK, encode, marked, pixels};
use crate::model::Model;
use crate::progress::{print, say};
use crate::sample::Sampling;
use crate::tokens::Tokenizer;

/// Generate text.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("begin").args(["prompt", "prompt_ids"]).required(true))]
pub(super) struct Args {
    /// The model.
    model: PathBuf,
    /// What to continue, or, with --chat, to answer.
    #[arg(long, short)]
    prompt: Option<String>,
    /// Token ids to continue in place of a text. A model without a tokenizer answers in token ids, too.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..),
          conflicts_with_all = ["chat", "system", "image"])]
    prompt_ids: Vec<i32>,
    /// An image (PNG or JPEG) for a model that takes them: where `<image>` stands in the prompt, at its beginning if
    /// that stands nowhere. Once for each image.
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Put the prompt into the model's chat template.
    #[arg(long)]
    chat: bool,
    /// With --chat: a system message.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// At most so many new tokens.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// Divides the logits; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0, value_name = "T", allow_hyphen_values = true,
          value_parser = super::number(0.0..=f32::MAX, "a number of 0 or more"))]
    temperature: f32,
    /// Choose among the K most probable tokens only; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Choose among the most probable tokens that together reach P.
    #[arg(long, default_value_t = 1.0, value_name = "P",
          value_parser = super::number(f32::MIN_POSITIVE..=1.0, "a number above 0, up to 1,"))]
    top_p: f32,
    /// Start of the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON object with prompt, text and tokens; what there is no text of is null.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let model = Model::open(&args.model)?;
    let help = "put the one of the original model into its folder, or give token ids with --prompt-ids";
    let reads = args.prompt.is_some() || model.file("tokenizer.json")?.is_some();
    let tokenizer = reads.then(|| model.tokenizer(help)).transpose()?;
    let prompt = match &args.prompt {
        Some(prompt) if args.chat => Some(chat(&model, args, prompt)?),
        given => given.clone(),
    };
    let images = match (model.module.images(), args.image.len()) {
        (_, 0) => None,
        (None, _) => {
            return Err(
                Failure::new(Exit::Usage, "--image: the model takes text alone, no images").help("leave it out")
            );
        }
        (Some(images), _) => Some(images),
    };
    let ids = match (&tokenizer, &prompt, &images) {
        (Some(tokenizer), Some(prompt), Some(images)) => encode(tokenizer, prompt, images, args.image.len())?,
        (Some(tokenizer), Some(prompt), None) => tokenizer.encode(prompt)?,
        (_, None, _) | (None, _, _) => args.prompt_ids.clone(),
    };
    if ids.is_empty() {
        return Err(Failure::new(Exit::Usage, "the prompt is empty"));
    }
    let settings = Settings {
        max_tokens: args.max_tokens,
        stop: stop_tokens(&model, tokenizer.as_ref())?,
        sampling: Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p },
        seed: args.seed,
    };
    let needed = ids.len().saturating_add(args.max_tokens);
    if let Some(room) = args.engine.ctx.filter(|room| *room < needed) {
        let (prompt, new) = (ids.len(), args.max_tokens);
        return Err(Failure::new(
            Exit::Usage,
            format!("--ctx {room}: {prompt} tokens of prompt and {new} new ones need {needed} positions"),
        )
        .help("make more room, or lower --max-tokens"));
    }
    if let Some(made) = model.positions().filter(|made| (needed as u64) > *made) {
        let (prompt, new) = (counted(ids.len() as u64, "token"), args.max_tokens);
        say(&format!(
            "warning: {prompt} of prompt and up to {new} new ones are more than the {made} positions that the model \
             was made for: text beyond them may make no sense"
        ));
    }
    let pixels = images.map(|images| pixels(&model, &images, &args.image)).transpose()?;
    let mut engine = engine(&model, &args.engine, needed, context.threads, &context.interrupt)?;
    if let Some(pixels) = pixels {
        engine.see(pixels)?;
    }
    let mut shown = String::new();
    let mut tokens = Vec::new();
    let mut show = |token: i32| {
        tokens.push(token);
        let Some(tokenizer) = &tokenizer else {
            let blank = if tokens.len() == 1 { "" } else { " " };
            return args.json || print(&format!("{blank}{token}"));
        };
        // A token may end inside a character: only whole ones are shown.
        let Ok(text) = tokenizer.decode(&tokens) else { return true };
        let whole = text.trim_end_matches('\u{fffd}');
        let Some(new) = whole.strip_prefix(shown.as_str()).map(str::to_owned) else { return true };
        shown.push_str(&new);
        args.json || print(&new)
    };
    let new = generate(engine.as_mut(), &ids, &settings, &context.interrupt, &mut show)?;
    if args.json {
        let text = tokenizer.as_ref().map(|t| t.decode(&new)).transpose()?;
        print_json(&serde_json::json!({ "prompt": prompt, "text": text, "prompt_ids": ids, "ids": new }))?;
    } else {
        print("\n");
    }
    context.interrupt.check()
}

/// The prompt in the model's chat template.
fn chat(model: &Model, args: &Args, prompt: &str) -> Result<String, Failure> {
    let config = model.json("tokenizer_config.json")?.unwrap_or(Json::Null);
    let beside = model.file("chat_template.jinja")?.and_then(|b| String::from_utf8(b).ok());
    let alone = model.json("chat_template.json")?.and_then(|v| Some(v["chat_template"].as_str()?.to_owned()));
    let inside = || config["chat_template"].as_str().map(str::to_owned);
    let template = beside.or(alone).or_else(inside).ok_or_else(|| {
        Failure::new(Exit::BadInput, "the model has no chat template")
            .help("run without --chat to continue the prompt as it is")
    })?;
    let content = |text: &str| match model.module.images() {
        Some(_) => Content::of(text, &template, MARK),
        None => Content::Text(text.to_owned()),
    };
    let turn = |role: &str, text: &str| Turn { role: role.into(), content: content(text) };
    let system = args.system.iter().map(|s| turn("system", s));
    let turns: Vec<Turn> = system.chain([turn("user", &marked(prompt, args.image.len()))]).collect();
    // A special token stands in the configuration as text or as an object with its text.
    let token =
        |key: &str| config[key].as_str().or_else(|| config[key]["content"].as_str()).unwrap_or_default().to_owned();
    render(&template, &turns, &token("bos_token"), &token("eos_token"))
}

/// The tokens that end a text: those of the generation settings, of the configuration, and the tokenizer's own; and one
/// that stands for an image, of which there are no more.
fn stop_tokens(model: &Model, tokenizer: Option<&Tokenizer>) -> Result<Vec<i32>, Failure> {
    let ids = |value: &Json| -> Vec<i32> {
        let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        list.iter().filter_map(Json::as_i64).filter_map(|id| i32::try_from(id).ok()).collect()
    };
    let mut stop = model.config.get("eos_token_id").map(&ids).unwrap_or_default();
    stop.extend(model.module.images().and_then(|images| i32::try_from(images.token?).ok()));
    if let Some(settings) = model.json("generation_config.json")? {
        stop.extend(ids(&settings["eos_token_id"]));
    }
    if let Some(config) = model.json("tokenizer_config.json")? {
        let token = config["eos_token"].as_str().or_else(|| config["eos_token"]["content"].as_str());
        stop.extend(tokenizer.zip(token).and_then(|(tokenizer, token)| tokenizer.id(token)));
    }
    Ok(stop)
}
