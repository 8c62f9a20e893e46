//! `awqc explain`: what a pass did to a model, and where it nearly did more.

use std::path::PathBuf;

use awqc_exec::{Control, HostExecutor};
use awqc_passes::pack::Pack;
use awqc_passes::pipeline::{Pipeline, Step};
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;
use awqc_passes::quantize_head::QuantizeHead;
use awqc_passes::remark::counted;
use awqc_passes::{Changed, Fidelity, Pass, RegionReport, RemarkKind, Remarks};

use super::calibrate::CalibrationArgs;
use super::{Context, print_json};
use crate::compile::{profiles, windows};
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::print;
use crate::target::{Method, Target};
use crate::watch::Watch;

/// Say what a pass does to a model, and why it does not do more.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model.
    model: PathBuf,
    /// The pass.
    #[arg(long)]
    pass: String,
    /// The passes to run, this one among them; by default those of the target that come before it, for a pass that
    /// changes nothing but the form only others of that kind.
    #[arg(long, value_name = "PIPELINE")]
    passes: Option<String>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Whose pipeline the pass belongs to.
    #[arg(long, default_value = "reference")]
    target: String,
    /// Print JSON instead.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    watch: Watch,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let model = Model::open(&args.model)?;
    let pipeline = match &args.passes {
        Some(pipeline) => pipeline.clone(),
        None => before(context, args)?,
    };
    let mut manager = args.watch.manager(&context.registry, &pipeline, &context.interrupt)?;
    let Some(at) = place(&pipeline, &args.pass) else {
        return Err(Failure::new(Exit::Usage, format!("--passes do not run `{}`", args.pass))
            .help("put it into the pipeline, or leave out --passes"));
    };
    let control = Control::new().with_interrupt(context.interrupt.flag());
    let mut exec = HostExecutor::new(model.source.clone()).with_control(control);
    if profiles(&pipeline) {
        // A few windows tell enough to explain a decision.
        let plan = args.calibration.plan(4)?;
        exec = exec.with_calibration(&windows(
            &model,
            &plan.calibration,
            plan.samples,
            plan.seqlen,
            &context.interrupt,
            context.quiet,
        )?)?;
    }
    let mut module = model.module;
    let mut remarks = Remarks::default();
    let done = manager.run_module(&mut module, &mut exec, &mut remarks, &mut |e| args.watch.show(e));
    let own: Vec<_> = remarks.list.iter().filter(|r| r.pass == args.pass).collect();
    if args.json {
        print_json(&own)?;
    } else {
        for remark in &own {
            let kind = match remark.kind {
                RemarkKind::Applied => "applied",
                RemarkKind::Missed => "missed",
                RemarkKind::Warning => "warning",
            };
            print(&format!("{:<8} {kind:<8} {}\n", remark.region, remark.message));
        }
        if let (true, Ok(reports)) = (own.is_empty(), &done) {
            let changed = |r: &RegionReport| r.changed.get(at) == Some(&Changed::Yes);
            print(&match reports.iter().filter(|r| changed(r)).count() as u64 {
                0 => format!("{} found nothing to do\n", args.pass),
                n => format!("{} changed {}; --print-ir-change shows what\n", args.pass, counted(n, "region")),
            });
        }
    }
    done.map(|_| ()).map_err(|e| crate::compile::pass_failure(&e))
}

/// Where a pipeline first names a pass.
fn place(pipeline: &str, pass: &str) -> Option<usize> {
    pipeline.parse::<Pipeline>().ok()?.steps.iter().position(|s| s.name == pass)
}

/// The passes of the target before this one, and it. A structural pass needs only other structural ones; `pack` also
/// what it packs, rounded in any way.
fn before(context: &Context, args: &Args) -> Result<String, Failure> {
    let Some(info) = context.registry.get(&args.pass) else {
        // The manager's own message names the nearest pass.
        return Ok(args.pass.clone());
    };
    let target = Target::find(&args.target)?;
    let scheme = awqc_ir::Quant { bits: 4, symmetric: false, group: awqc_ir::Group::Size(target.group) };
    let mut pipeline: Pipeline = target
        .pipeline(Method::default(), scheme, 8)
        .parse()
        .map_err(|e| Failure::new(Exit::Failed, format!("the target's pipeline: {e}")))?;
    let at = pipeline.steps.iter().position(|s| s.name == info.name).unwrap_or(pipeline.steps.len());
    let mut behind = pipeline.steps.split_off(at).into_iter();
    let own = behind.next().unwrap_or(Step { name: info.name.clone(), options: Default::default() });
    let structural =
        |name: &str| context.registry.get(name).is_some_and(|p| p.fidelity == Fidelity::Exact) && name != Profile::NAME;
    if structural(&info.name) {
        let packed = |name: &str| info.name == Pack::NAME && [Quantize::NAME, QuantizeHead::NAME].contains(&name);
        pipeline.steps.retain(|s| structural(&s.name) || packed(&s.name));
        pipeline.steps.push(own);
    } else {
        pipeline.steps.push(own);
        // The searches before `quantize` want to know what it will do.
        pipeline.steps.extend(behind.find(|s| s.name == Quantize::NAME));
    }
    Ok(pipeline.to_string())
}
