//! The command line: what people type, and how a mistake in it is answered.

use std::process::ExitCode;

use clap::{Parser, Subcommand, error::ErrorKind};

use crate::{commands, text::complain, umask};

/// Whole activations, gradients and parameters out of unmodified distributed PyTorch jobs.
#[derive(Debug, Parser)]
#[command(name = "flexmodel", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command with taps in it and keep what they capture
    Run(commands::run::Args),
    /// Run the sidecar alone; jobs attach and re-attach to it
    Agent(commands::agent::Args),
    /// Say what is tapped in a job that runs, and change it
    Hooks(commands::hooks::Args),
    /// List what a run holds: modules, kinds, steps, shapes, bytes
    Ls(commands::ls::Args),
    /// Show statistics and a small picture of one tensor
    Show(commands::show::Args),
    /// Write a run's tensors in another format
    Export(commands::export::Args),
    /// Check every checksum and layout of a run
    Verify(commands::verify::Args),
    /// Compare a run with another, record by record; exit code 1 where they differ
    Certify(commands::certify::Args),
    /// Say what would work on this machine and what would not, and why
    Doctor(commands::doctor::Args),
    /// List or build the bridges for the torch of this environment
    Bridge(commands::bridge::Args),
}

/// A mistake in how a command was used: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Reads the command line. Help goes to stdout; a mistake is one line on stderr.
pub fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            print!("{error}");
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprint!("{error}");
            ExitCode::from(2)
        }
        _ => {
            complain("flexmodel", one_line(&error.to_string()));
            ExitCode::from(2)
        }
    })
}

/// clap's message without its label, its usage block and its line breaks.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let head = text.split("\n\nUsage:").next().unwrap_or(text);
    let head = head.split("\n\nFor more information").next().unwrap_or(head);
    head.split_whitespace().collect::<Vec<_>>().join(" ") + "; see flexmodel --help"
}

/// 2 for a mistake in usage, 1 for a failure.
pub fn exit_code_of(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() { 2 } else { 1 }
}

impl Cli {
    /// Runs the command.
    pub fn dispatch(self) -> anyhow::Result<ExitCode> {
        if matches!(self.command, Command::Run(_) | Command::Agent(_) | Command::Bridge(_)) {
            umask::begin();
        }
        match self.command {
            Command::Run(args) => commands::run::main(args),
            Command::Agent(args) => commands::agent::main(args),
            Command::Hooks(args) => commands::hooks::main(args),
            Command::Ls(args) => commands::ls::main(args),
            Command::Show(args) => commands::show::main(args),
            Command::Export(args) => commands::export::main(args),
            Command::Verify(args) => commands::verify::main(args),
            Command::Certify(args) => commands::certify::main(args),
            Command::Doctor(args) => commands::doctor::main(args),
            Command::Bridge(args) => commands::bridge::main(args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_mistake_is_one_line_without_the_usage_block() {
        let error = Cli::try_parse_from(["flexmodel", "rnu"]).unwrap_err().to_string();
        let line = one_line(&error);
        assert!(!line.contains('\n') && !line.contains("Usage:") && line.contains("rnu"), "{line}");
    }

    #[test]
    fn everything_behind_the_command_is_the_commands() {
        let cli =
            Cli::try_parse_from(["flexmodel", "run", "--hooks", "a", "--", "python", "t.py", "--out", "x"]).unwrap();
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert_eq!(args.command, ["python", "t.py", "--out", "x"]);
        assert_eq!(args.out, None);
    }
}
