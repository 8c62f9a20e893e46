//! awqc
