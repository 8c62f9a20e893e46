//! awqc
fn main() {}
