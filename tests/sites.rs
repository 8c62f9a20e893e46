//! Where scale may move, in every family: discovered, never listed. One table to review, and each site tried out with
//! random scales.

use std::fmt::Write as _;

use awqc::exec::{Control, Host, Logits, Session, stream};
use awqc::model::Model;
use awqc::passes::Facts;
use awqc::passes::analysis::gauge;
use awqc::passes::manager::shared_tensors;

use crate::models::{Expected, float_folders, name};

#[test]
fn the_table_of_sites() {
    let mut table = String::new();
    for folder in float_folders() {
        let model = Model::open(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let shared = shared_tensors(&model.module.regions);
        let _ = writeln!(table, "{}", name(&folder));
        let mut last = String::new();
        for region in &model.module.regions {
            let sites = gauge::sites(region, &shared);
            let lines: String = sites.iter().map(|s| format!("    {}\n", gauge::describe(region, s))).collect();
            // Layers alike print once.
            if lines != last || !(region.name.is_layer() || region.name.numbered().is_some()) {
                let _ = write!(table, "  {}\n{lines}", region.name);
            }
            last = lines;
        }
    }
    insta::assert_snapshot!(table);
}

#[test]
fn random_scales_at_every_site_leave_the_logits_alone() {
    let mut rng = fastrand::Rng::with_seed(11);
    for folder in float_folders() {
        let (name, expected) = (name(&folder), Expected::read(&folder));
        let Model { mut module, source, .. } = Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let shared = shared_tensors(&module.regions);
        // In f32 throughout: what is tested is the algebra, not the rounding of stored weights.
        let mut tried = 0;
        for region in &mut module.regions {
            let sites = gauge::sites(region, &shared);
            for site in sites {
                let scales: Vec<f32> = (0..site.free).map(|_| (rng.f32() * 2.0 - 1.0).exp()).collect();
                gauge::apply(region, &site, &scales, "random", &mut Facts::default());
                tried += 1;
            }
        }
        assert!(tried > 0 || name == "opt-post-norm", "{name}: no site");
        let as_f32 = text_in_f32(&module);
        let mut logits = Vec::new();
        let as_f32 = awqc::ir::verify::verify(&as_f32).unwrap_or_else(|e| panic!("{name}: {e}"));
        match expected.pixels(None) {
            Some(pixels) => {
                let ids = expected.ids();
                let ids: Vec<&[i32]> = ids.iter().map(Vec::as_slice).collect();
                let session = Session::<Host>::new(as_f32, source.as_ref(), Default::default());
                let mut session = session.unwrap_or_else(|e| panic!("{name}: {e}"));
                session.see(pixels, &mut |_, _| Ok(())).unwrap_or_else(|e| panic!("{name}: {e}"));
                logits = session.forward_batch(&ids, Logits::All).unwrap_or_else(|e| panic!("{name}: {e}")).data;
            }
            None => stream::stream(as_f32, source.as_ref(), &expected.ids(), &Control::new(), &mut |chunk| {
                logits.extend(chunk.logits.data);
                Ok(())
            })
            .unwrap_or_else(|e| panic!("{name}: {e}")),
        }
        let want = &expected.floats["logits"].1;
        let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = crate::models::largest_difference(&logits, want);
        assert!(worst <= 2e-5 * scale.max(1.0) + 1e-4, "{name}: logits moved by {worst} of {scale}");
    }
}

/// The module with every weight that a pass derived kept in f32.
fn text_in_f32(module: &awqc::ir::Module) -> awqc::ir::Module {
    let mut out = module.clone();
    for region in &mut out.regions {
        for id in region.weight_ids() {
            let weight = region.weight(id).clone();
            if !matches!(weight.expr, awqc::ir::WeightExpr::Source(_)) && weight.ty.elem.is_float() {
                region.set_weight(id, weight.expr, weight.ty.with_elem(awqc::ir::Elem::F32));
            }
        }
    }
    out
}
