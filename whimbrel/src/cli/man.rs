//! `whimbrel man`: a page for each command, with the examples of its `--help`.

use super::Exit;
use super::args::{Cli, EXIT_CODES, HEADING};
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

pub fn man(folder: &Path) -> anyhow::Result<Exit> {
    std::fs::create_dir_all(folder)?;
    let mut whole = Cli::command().disable_help_subcommand(true);
    whole.build();
    pages(&whole, folder)?;
    Ok(Exit::Done)
}

fn pages(command: &Command, folder: &Path) -> io::Result<()> {
    for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        pages(command, folder)?;
    }
    let man = Man::new(command.clone());
    let mut file = BufWriter::new(File::create(folder.join(man.get_filename()))?);
    page(command, &man, &mut file)?;
    file.flush()
}

fn page(command: &Command, man: &Man, out: &mut dyn Write) -> io::Result<()> {
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(out)?;
    }
    if command.get_subcommands().any(|command| !command.is_hide_set()) {
        man.render_subcommands_section(out)?;
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    if help.contains(EXIT_CODES) {
        let mut roff = Roff::new();
        roff.control("SH", ["EXIT STATUS"]).text([roman(EXIT_CODES)]);
        roff.to_writer(out)?;
    }
    examples(&help, out)?;
    if command.get_version().is_some() {
        man.render_version_section(out)?;
    }
    Ok(())
}

/// Each is a line that says what it does, and one with the command.
fn examples(help: &str, out: &mut dyn Write) -> io::Result<()> {
    let Some((_, examples)) = help.split_once(HEADING) else { return Ok(()) };
    let mut roff = Roff::new();
    roff.control("SH", ["EXAMPLES"]);
    let lines: Vec<_> = examples.lines().filter(|line| line.starts_with("  ")).collect();
    for pair in lines.chunks_exact(2) {
        roff.control("PP", []).text([roman(pair[0].trim())]);
        roff.control("RS", ["4"]).control("nf", []).text([bold(pair[1].trim())]);
        roff.control("fi", []).control("RE", []);
    }
    roff.to_writer(out)
}
