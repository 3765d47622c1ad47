//! `flexmodel`: runs jobs with taps, keeps what they capture, and shows it.

mod cli;
mod commands;
mod dashboard;
mod home;
mod live;
mod owner_only;
mod read;
mod say;
mod server;
mod store;
mod summary;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.dispatch() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("flexmodel: {error:#}");
            ExitCode::from(cli::exit_code_of(&error))
        }
    }
}
