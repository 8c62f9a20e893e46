//! Mixtures of experts through the whole recipe: statistics, scales and bounds of each expert by itself, and rounding
//! as they are for those that saw next to nothing.

use std::sync::Arc;

use awqc::exec::{Control, HostExecutor, stream};
use awqc::interrupt::Interrupt;
use awqc::ir::Module;
use awqc::ir::verify::verify;
use awqc::model::Model;
use awqc::passes::{RemarkKind, Remarks};
use awqc::standard::registry;
use awqc::watch::Watch;

use crate::models::float_folders;

fn windows(count: usize, vocabulary: i32) -> Vec<Vec<i32>> {
    let mut rng = fastrand::Rng::with_seed(3);
    (0..count).map(|_| (0..12).map(|_| rng.i32(3..vocabulary)).collect()).collect()
}

fn model(name: &str) -> Model {
    let folder = float_folders().into_iter().find(|f| f.ends_with(name)).expect("a golden");
    Model::open(&folder).expect("a model")
}

/// The module behind the passes, and what they said.
fn compiled(model: &Model, pipeline: &str, calibration: &[Vec<i32>]) -> (Module, Remarks) {
    let mut module = model.module.clone();
    let mut manager = Watch::default().manager(&registry(), pipeline, &Interrupt::default()).expect("the pipeline");
    let mut exec = HostExecutor::new(Arc::clone(&model.source)).with_calibration(calibration).expect("calibration");
    let mut remarks = Remarks::default();
    manager.run_module(&mut module, &mut exec, &mut remarks, &mut |_| {}).expect("the passes run");
    (module, remarks)
}

fn logits(model: &Model, module: &Module, ids: &[Vec<i32>]) -> Vec<f32> {
    let mut out = Vec::new();
    stream::stream(
        verify(module).expect("a valid module"),
        model.source.as_ref(),
        ids,
        &Control::new(),
        &mut |chunk| {
            out.extend(chunk.logits.data);
            Ok(())
        },
    )
    .expect("the module runs");
    out
}

#[test]
fn every_expert_is_searched_for_by_itself() {
    let ids = windows(60, 160);
    for (name, chosen) in [("mixtral", 2.0), ("deepseek_v3", 3.0)] {
        let model = model(name);
        let want = logits(&model, &model.module, &ids);
        let error = |module: &Module| {
            let got = logits(&model, module, &ids);
            got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        let (rounded, _) = compiled(&model, "quantize{bits=3,group=16}", &ids);
        let (searched, remarks) = compiled(&model, "profile,awq-scale,awq-clip,quantize{bits=3,group=16}", &ids);
        let (before, after) = (error(&rounded), error(&searched));
        assert!(after < 0.9 * before, "{name}: the error went from {before} to {after}");
        let (by_block, _) = compiled(&model, "profile,awq-scale{loss=block,grid=4},quantize{bits=3,group=16}", &ids);
        assert!(error(&by_block) < before, "{name}: the block's loss made it worse");
        // Each token counts at as many experts as it was sent to.
        let counts: Vec<f64> = remarks
            .records
            .iter()
            .filter_map(|(_, r)| r["tokens"].as_array())
            .map(|experts| experts.iter().filter_map(serde_json::Value::as_f64).sum())
            .collect();
        assert!(!counts.is_empty() && counts.iter().all(|n| *n == 720.0 * chosen), "{name}: {counts:?}");
        let parts = remarks.list.iter().filter(|r| r.kind == RemarkKind::Applied && r.message.contains(" parts"));
        assert!(parts.count() > 0, "{name}: no site was decided expert by expert");
    }
}

#[test]
fn the_errors_of_every_expert_are_compensated_by_its_own_tokens() {
    let ids = windows(60, 160);
    for name in ["mixtral", "deepseek_v3"] {
        let model = model(name);
        let want = logits(&model, &model.module, &ids);
        let error = |pipeline: &str, ids: &[Vec<i32>], calibration: &[Vec<i32>]| {
            let (module, remarks) = compiled(&model, pipeline, calibration);
            let got = logits(&model, &module, ids);
            (got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>(), module, remarks)
        };
        let (rounded, ..) = error("quantize{bits=3,group=16}", &ids, &ids);
        const GPTQ: &str = "profile,quantize{bits=3,group=16,method=gptq},fuse-qkv,fuse-gate-up,dce";
        let (compensated, module, remarks) = error(GPTQ, &ids, &ids);
        assert!(compensated < 0.9 * rounded, "{name}: the error went from {rounded} to {compensated}");
        // Codes of two stacks are joined matrix by matrix, and the errors are compensated for each.
        let text = awqc::ir::text::print(&module);
        assert!(text.contains("cat.1($") && text.contains("codes of"), "{text}");
        let warned = remarks.list.iter().filter(|r| r.kind == RemarkKind::Warning).count();
        assert_eq!(warned, 0, "{name}");
        // An expert without tokens is rounded, and named.
        let (_, _, remarks) = error(GPTQ, &ids, &ids[..2]);
        let named = |r: &&awqc::passes::Remark| r.kind == RemarkKind::Warning && r.message.contains("experts ");
        assert!(remarks.list.iter().filter(named).count() > 0, "{name}: {:?}", remarks.list);
    }
}

#[test]
fn experts_that_saw_next_to_nothing_are_rounded_as_they_are() {
    let model = model("mixtral");
    let few = windows(1, 160);
    let (searched, remarks) = compiled(&model, "profile,awq-scale,awq-clip,quantize{bits=4,group=16}", &few);
    let warned = |r: &&awqc::passes::Remark| r.kind == RemarkKind::Warning && r.message.contains("4 of 4 experts");
    // In each of two layers: the experts' input, and what lies between their linears.
    assert_eq!(remarks.list.iter().filter(warned).count(), 4);
    // No scales between up and down; those of the norm are judged by the whole site.
    let labels: Vec<String> = searched
        .regions
        .iter()
        .flat_map(|r| r.data_ids().map(|d| r.data(d).label.to_string()).collect::<Vec<_>>())
        .filter(|l| l.starts_with("scales"))
        .collect();
    assert!(!labels.is_empty() && labels.iter().all(|l| !l.contains("up -> down")), "{labels:?}");
}
