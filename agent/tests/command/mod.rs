//! The command `flexmodel` as a person runs it.

use std::process::{Command, Output};

/// Runs it to its end.
pub fn flexmodel(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flexmodel")).args(args).output().unwrap()
}

/// What it printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
