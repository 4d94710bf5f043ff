//! The `daxcrypt` program.
fn main() {}
