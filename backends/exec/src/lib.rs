//! awqc-exec
