//! awqc-frontends
