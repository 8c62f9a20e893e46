//! File tests: IR text in, passes, IR text out. Each is run before and after on weights made from the tensors' names
//! and compared, before the snapshot is looked at. Adding a test is adding a file.

use std::path::Path;

use awqc::exec::HostExecutor;
use awqc::interrupt::Interrupt;
use awqc::ir::text;
use awqc::model::Model;
use awqc::passes::Remarks;
use awqc::standard::registry;
use awqc::watch::Watch;

fn run(path: &Path) -> String {
    let input = std::fs::read_to_string(path).expect("a file test");
    let pipeline =
        input.lines().next().and_then(|l| l.strip_prefix("// passes:")).expect("`// passes: …` on line 1").trim();
    let Model { mut module, source, .. } = Model::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let printed = text::print(&module);
    let reread = text::parse(&printed).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text::print(&reread), printed, "{}: print and parse", path.display());

    let watch = Watch { check_each: true, ..Watch::default() };
    let mut manager = watch.manager(&registry(), pipeline, &Interrupt::default()).expect("the pipeline");
    // For pipelines that profile: token ids below the smallest vocabulary that a file test has.
    let windows: Vec<Vec<i32>> = (0..6).map(|w| (0..20).map(|t| (w * 11 + t * t * 5 + t) % 32).collect()).collect();
    let mut exec = HostExecutor::new(source).with_calibration(&windows).expect("token windows");
    let mut remarks = Remarks::default();
    let done = manager.run_module(&mut module, &mut exec, &mut remarks, &mut |_| {});
    done.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text::print(&module)
}

#[test]
fn passes_on_ir_text() {
    insta::with_settings!({ snapshot_path => "filetests/snapshots", prepend_module_to_snapshot => false }, {
        insta::glob!("filetests/passes/*/*.awqir", |path| {
            insta::assert_snapshot!(run(path));
        });
    });
}
