//! What the command `flexmodel` does: it runs jobs with taps, keeps what they capture, and shows it. A library besides the
//! program, so that tests reach the server in their own process.

mod cli;
mod commands;
mod dashboard;
mod descriptors;
mod home;
mod live;
mod memory;
mod newcomers;
mod say;
mod secrets;
pub mod server;
mod summary;
mod text;
mod umask;

use std::process::ExitCode;

/// The whole of the program.
pub fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.dispatch() {
        Ok(code) => code,
        Err(error) => {
            text::complain_in_lines(format_args!("flexmodel: {error:#}"));
            ExitCode::from(cli::exit_code_of(&error))
        }
    }
}
