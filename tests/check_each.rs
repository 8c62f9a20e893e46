//! Every pass, on every golden model: the function is the same before and after, within what the pass promises.

use awqc::exec::HostExecutor;
use awqc::interrupt::Interrupt;
use awqc::ir::text;
use awqc::ir::verify::{Stage, verify, verify_stage};
use awqc::model::Model;
use awqc::passes::Remarks;
use awqc::standard::registry;
use awqc::watch::Watch;

use crate::models::{Expected, float_folders, name};

const PIPELINE: &str = "canonicalize,dce,profile,awq-scale,awq-clip,quantize{bits=4,group=16},\
                        fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce";

#[test]
fn every_pass_preserves_every_model() {
    for folder in float_folders() {
        let (name, expected) = (name(&folder), Expected::read(&folder));
        let Model { mut module, source, .. } = Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let watch = Watch { check_each: true, ..Watch::default() };
        let mut manager = watch.manager(&registry(), PIPELINE, &Interrupt::default()).expect("the pipeline");
        let mut exec = HostExecutor::new(source).with_calibration(&expected.text()).expect("calibration");
        let mut remarks = Remarks::default();
        manager.run_module(&mut module, &mut exec, &mut remarks, &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        verify(&module).unwrap_or_else(|e| panic!("{name}: {e}"));
        verify_stage(&module, Stage::Quantized).unwrap_or_else(|e| panic!("{name}: {e}"));
        let printed = text::print(&module);
        let reread = text::parse(&printed).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(text::print(&reread), printed, "{name}: print and parse");
        assert!(printed.contains("u4g16["), "{name}: nothing was quantized");
    }
}
