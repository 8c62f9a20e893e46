//! The one visible list of passes.

use awqc_passes::Registry;

/// Every pass of this project.
pub fn registry() -> Registry {
    Registry::empty()
        .with::<awqc_passes::canonicalize::Canonicalize>()
        .with::<awqc_passes::dce::Dce>()
        .with::<awqc_passes::profile::Profile>()
        .with::<awqc_passes::awq_scale::AwqScale>()
        .with::<awqc_passes::awq_clip::AwqClip>()
        .with::<awqc_passes::quantize::Quantize>()
        .with::<awqc_passes::tune::Tune>()
        .with::<awqc_passes::quantize_head::QuantizeHead>()
        .with::<awqc_passes::fuse_qkv::FuseQkv>()
        .with::<awqc_passes::fuse_gate_up::FuseGateUp>()
        .with::<awqc_passes::fuse_norm::FuseNorm>()
        .with::<awqc_passes::fuse_rope::FuseRope>()
        .with::<awqc_passes::fuse_swiglu::FuseSwiglu>()
        .with::<awqc_passes::pack::Pack>()
}
