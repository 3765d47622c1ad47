//! `flexmodel`: runs jobs with taps, keeps what they capture, and shows it.

mod cli;
mod commands;
mod dashboard;
mod descriptors;
mod home;
mod live;
mod newcomers;
mod say;
mod secrets;
mod server;
mod summary;
mod text;
mod umask;

use std::process::ExitCode;

fn main() -> ExitCode {
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
