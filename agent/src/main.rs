//! The command `flexmodel`.

use std::process::ExitCode;

fn main() -> ExitCode {
    flexmodel_agent::main()
}
