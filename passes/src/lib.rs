//! awqc-passes
