//! The `whimbrel` program.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::config::parse(std::env::args_os()) {
        Ok(cli) => cli::run(cli),
        Err(error) => error.exit(),
    }
}
