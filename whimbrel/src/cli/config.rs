//! The command line, with what a configuration file adds to it.
//!
//! A file's entries become arguments: `memory = "4G"` is `--memory=4G`. So there is one definition of what a
//! machine can be told, one parser for each value, and one judge of what goes together: clap. Whatever the
//! command line itself says of an option replaces what the file says of it.

use super::args::Cli;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, Parser};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use whimbrel::toml_file::{self, TomlFile};

/// The option that names the file.
const OPTION: &str = "config";

/// The command that has a file of another kind.
const SERVICE: &str = "host";

/// Why there is nothing to be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong, or asks for help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The configuration file cannot be used.
    #[error(transparent)]
    File(#[from] toml_file::Error),
}

impl Error {
    /// Tells it, and ends the process as clap does: with 2 for wrong usage.
    pub fn exit(&self) -> ! {
        match self {
            Error::Usage(error) => error.exit(),
            _ => {
                eprintln!("whimbrel: {self}");
                std::process::exit(2)
            }
        }
    }
}

/// Understands a command line, whose first word is the program.
///
/// # Errors
/// [`Error`].
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, Error> {
    let mut words: Vec<OsString> = words.into_iter().collect();
    // At first only to see where the file is and what else is there: what is lacking may be in the file, and
    // what is wrong is found below.
    let look = Cli::command().ignore_errors(true).try_get_matches_from(&words);
    let Some((name, given)) = look.as_ref().ok().and_then(ArgMatches::subcommand) else {
        return Ok(Cli::try_parse_from(words)?);
    };
    // The host service's file is no list of options.
    let file = given.try_get_one::<PathBuf>(OPTION).ok().flatten().filter(|_| name != SERVICE);
    let Some(path) = file else {
        return Ok(Cli::try_parse_from(words)?);
    };
    let file = File::read(path, name, given)?;
    // Behind the program and the command.
    let added = file.entries.iter().flat_map(|entry| &entry.words).map(OsString::from);
    words.splice(2..2, added);
    Cli::try_parse_from(words).map_err(|error| file.blame(error))
}

/// What a file says that the command line does not.
struct File {
    path: PathBuf,
    entries: Vec<Entry>,
}

struct Entry {
    key: String,
    line: usize,
    words: Vec<String>,
}

impl File {
    /// The file at `path` for the command of this name, of which `given` was on the command line.
    fn read(path: &Path, command: &str, given: &ArgMatches) -> Result<Self, Error> {
        let read = TomlFile::read(path, "the configuration file")?;
        let table = DeTable::parse(&read.text).map_err(|error| read.wrong(&error))?;
        let program = Cli::command();
        let options: Vec<&Arg> = program
            .find_subcommand(command)
            .into_iter()
            .flat_map(|command| command.get_arguments())
            .collect();
        let mut entries = Vec::new();
        for (key, value) in table.get_ref() {
            let (at, key) = (key.span().start, key.get_ref());
            let named = |option: &&&Arg| option.get_long() == Some(key) && key != OPTION;
            let option = options.iter().find(named).ok_or_else(|| {
                read.entry(at, format!("\"{key}\" is not an option of `whimbrel {command}`; see its --help"))
            })?;
            let words = words(option, key, value.get_ref()).map_err(|what| read.entry(at, what))?;
            if given.value_source(option.get_id().as_str()) != Some(ValueSource::CommandLine) {
                entries.push(Entry { key: key.to_string(), line: read.line(at), words });
            }
        }
        Ok(File { path: path.into(), entries })
    }

    /// Names the entry that clap found fault with, if it was one.
    fn blame(&self, error: clap::Error) -> Error {
        let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
            return error.into();
        };
        // It is shown as it is in the help: `--memory <MEMORY>`.
        let option = option.split(' ').next().and_then(|option| option.strip_prefix("--"));
        let Some(entry) = self.entries.iter().find(|entry| Some(entry.key.as_str()) == option) else {
            return error.into();
        };
        let text = error.to_string();
        let lines = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
        let what = lines.collect::<Vec<_>>().join(" ");
        let what = what.strip_prefix("error: ").unwrap_or(&what).into();
        toml_file::Error::Entry { path: self.path.clone(), line: entry.line, what }.into()
    }
}

/// An entry as arguments.
fn words(option: &Arg, key: &str, value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Ok(format!("--{key}={text}")),
        DeValue::Integer(number) => Ok(format!("--{key}={number}")),
        DeValue::Float(number) => Ok(format!("--{key}={number}")),
        _ => Err(format!("\"{key}\" takes a text or a number, as --{key} does")),
    };
    match (option.get_action(), value) {
        (ArgAction::SetTrue, DeValue::Boolean(true)) => Ok(vec![format!("--{key}")]),
        (ArgAction::SetTrue, DeValue::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, _) => Err(format!("\"{key}\" is true or false")),
        (ArgAction::Append, DeValue::Array(list)) => list.iter().map(Spanned::get_ref).map(one).collect(),
        _ => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::{Command, OutputTarget, ReceiveArgs, RunArgs, SerialTarget};
    use super::*;
    use std::time::Duration;

    /// Parses `whimbrel LINE --config FILE` for a file with this content.
    fn parsed(line: &str, content: &str) -> Result<Command, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.toml");
        std::fs::write(&path, content).unwrap();
        let words = ["whimbrel"].into_iter().chain(line.split_whitespace()).map(OsString::from);
        parse(words.chain(["--config".into(), path.into()])).map(|cli| cli.command)
    }

    fn run(line: &str, content: &str) -> RunArgs {
        match parsed(&format!("run {line}"), content).unwrap() {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn receive(line: &str, content: &str) -> ReceiveArgs {
        match parsed(&format!("receive {line}"), content).unwrap() {
            Command::Receive(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn wrong(line: &str, content: &str) -> String {
        let error = parsed(line, content).unwrap_err();
        assert!(!matches!(error, Error::Usage(_)), "{error}");
        error.to_string()
    }

    #[test]
    fn entries_are_options() {
        let content = "memory = \"2G\"\nvcpus = 2\nkernel = 'vmlinuz'\ninitramfs = 'initrd'\nrng = true\njson = false\n\
                       disk = ['a.raw,queues=2', 'b.raw']\nnet = 'tap=vm1'\n";
        let args = run("", content);
        assert_eq!((args.machine.memory, args.machine.vcpus), (2 << 30, 2));
        assert_eq!(args.kernel, Some("vmlinuz".into()));
        assert!(args.rng && !args.process.json);
        assert_eq!((args.disk.len(), args.disk[0].queues), (2, 2));
        assert_eq!(args.net[0].tap.name, "vm1");
        let args = receive("", "listen = '127.0.0.1:7'\ndisks = ['/a', '/b']\nonce = true\n");
        assert_eq!((args.listen.map(|l| l.port()), args.disks.len(), args.once), (Some(7), 2, true));
    }

    #[test]
    fn the_command_line_wins() {
        let content = "memory = '2G'\nvcpus = 2\ndisk = ['a.raw', 'b.raw']\nname = 'file'\n";
        let args = run("-m 64M --disk c.raw --name line", content);
        assert_eq!((args.machine.memory, args.machine.vcpus), (64 << 20, 2));
        assert_eq!((args.disk.len(), args.disk[0].path.as_path()), (1, Path::new("c.raw")));
        assert_eq!(args.process.name.as_deref(), Some("line"));
    }

    #[test]
    fn what_is_wrong_is_told_by_file_line_and_key() {
        for (content, expected) in [
            ("memory = '1G'\n\ncolour = 1\n", "vm.toml:3: \"colour\" is not an option of `whimbrel run`"),
            ("vcpus = 1\nmemory = 'much'\n", "vm.toml:2: invalid value 'much' for '--memory <MEMORY>'"),
            ("fill-with = 'water'", "vm.toml:1: invalid value 'water' for '--fill-with <FILL_WITH>'"),
            ("\nvcpus = 255\n", "vm.toml:2: invalid value '255' for '--vcpus <VCPUS>'"),
            ("vcpus = [1, 2]\n", "vm.toml:1: \"vcpus\" takes a text or a number"),
            ("disk = [['a']]\n", "vm.toml:1: \"disk\" takes a text or a number"),
            ("[memory]\nsize = 1\n", "vm.toml:1: \"memory\" takes a text or a number"),
            ("rng = 'yes'\n", "vm.toml:1: \"rng\" is true or false"),
            ("vcpus = true\n", "vm.toml:1: \"vcpus\" takes a text or a number"),
            ("config = 'other.toml'\n", "vm.toml:1: \"config\" is not an option"),
            ("help = true\n", "vm.toml:1: \"help\" is not an option"),
            ("listen = '127.0.0.1:7'\n", "vm.toml:1: \"listen\" is not an option of `whimbrel run`"),
            ("vcpus = 1\nvcpus = 2\n", "vm.toml:2: duplicate key"),
            ("vcpus = 1\nmemory =\n", "vm.toml:2: "),
            ("vcpus = 0x10000000000000000000\n", "vm.toml:1: "),
            ("name = \"\\u0000\\ud800\"\n", "vm.toml:1: "),
        ] {
            let told = wrong("run", content);
            assert!(told.contains(expected), "{content:?}: {told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
        // Nested without end.
        let deep = format!("disk = {}", "[".repeat(100_000));
        assert!(wrong("run", &deep).contains("vm.toml:1: "));
        assert!(parsed("run", "initramfs = 'initrd'\n").is_err(), "an initramfs without a kernel");
        assert!(parsed("receive", "once = true\n").is_err(), "nowhere to listen");
        assert!(parsed("run --bogus", "vcpus = 1\n").is_err());
        assert!(parsed("status --api x", "").is_err(), "only for what holds a machine");
        let words = ["whimbrel", "run", "--config", "/nonexistent/vm.toml"].map(OsString::from);
        assert!(parse(words).unwrap_err().to_string().contains("/nonexistent/vm.toml"));
    }

    #[test]
    fn the_examples_of_the_guide_are_good() {
        let guide = include_str!("../../../docs/machines.md");
        let examples: Vec<_> =
            guide.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        let [vm, receiver] = examples[..] else { panic!("{} examples", examples.len()) };
        let args = run("", vm);
        assert_eq!((args.machine.memory, args.machine.vcpus), (2 << 30, 2));
        assert_eq!((args.disk.len(), args.net.len(), args.rng), (2, 1, true));
        assert!(args.disk[0].queues == 2 && args.disk[1].readonly);
        assert!(matches!(args.process.serial, SerialTarget::Output(OutputTarget::File(_))));
        assert_eq!(args.process.announce.rounds, 8);
        let args = receive("", receiver);
        assert_eq!((args.disks.len(), args.net.len(), args.populate), (1, 1, true));
        assert_eq!(args.process.announce.initial, Duration::from_millis(50));
    }
}
