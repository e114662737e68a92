//! Files of measurements: lines of JSON, each written as soon as its run is over.
//!
//! A measurement that was cut off lacks its end and is valid up to there. A file may hold several
//! measurements, one after the other.

use crate::record::{FORMAT, Line, Measurement};
use anyhow::{Context, bail};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// The most rounds of a measurement, since columns have a place for each.
const MAX_ROUNDS: u32 = 100_000;

/// Reads the measurements in a file.
///
/// # Errors
/// When the file holds no measurement, or a line is not one that [`Log`] writes. Only the last line may be
/// incomplete.
pub fn read(path: &Path) -> anyhow::Result<Vec<Measurement>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Vec<Measurement>> {
    let mut all: Vec<Measurement> = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let parsed = match serde_json::from_str(line) {
            Ok(parsed) => parsed,
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => bail!("line {}: {e}; is it a file that --save wrote?", number + 1),
        };
        match (parsed, all.last_mut()) {
            (Line::Head(head), _) if head.format != FORMAT => {
                bail!("line {}: format {} instead of {FORMAT}; measure again", number + 1, head.format)
            }
            (Line::Head(head), _) if head.rounds > MAX_ROUNDS => {
                bail!("line {}: {} rounds, more than anybody has made", number + 1, head.rounds)
            }
            (Line::Head(head), _) => all.push(Measurement::new(*head)),
            (Line::Run(run), Some(Measurement { head, runs, .. }))
                if run.contender < head.contenders.len() && run.round < head.rounds =>
            {
                runs.push(run);
            }
            (Line::End(end), Some(last)) => last.end = Some(end),
            (Line::Run(_) | Line::End(_), _) => bail!("line {}: a run of nothing that was begun", number + 1),
        }
    }
    anyhow::ensure!(!all.is_empty(), "there is no measurement in it");
    Ok(all)
}

/// Writes lines as they come.
pub struct Log {
    file: Option<File>,
    stdout: bool,
}

impl Log {
    /// A log that goes to standard output, to the end of a file, to both or to neither.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(stdout: bool, path: Option<&Path>) -> anyhow::Result<Self> {
        let open = |path: &Path| -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
            cut_torn_line(&mut file)?;
            Ok(file)
        };
        let file = path.map(|path| open(path).with_context(|| format!("cannot write to {}", path.display())));
        Ok(Log { file: file.transpose()?, stdout })
    }

    /// Writes a line. When this returns, the kernel has it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &Line) -> anyhow::Result<()> {
        if self.file.is_none() && !self.stdout {
            return Ok(());
        }
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        if let Some(file) = &mut self.file {
            file.write_all(text.as_bytes()).context("cannot save a run")?;
        }
        if self.stdout {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot print a run")?;
        }
        Ok(())
    }
}

/// Removes an incomplete last line, which would spoil the line that follows.
fn cut_torn_line(file: &mut File) -> std::io::Result<()> {
    let mut text = Vec::new();
    std::io::Read::read_to_end(file, &mut text)?;
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if whole < text.len() {
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::measurement;

    fn lines(of: &Measurement) -> Vec<Line> {
        let head = std::iter::once(Line::Head(Box::new(of.head.clone())));
        let ends = of.end.iter().cloned().map(Line::End);
        head.chain(of.runs.iter().cloned().map(Line::Run)).chain(ends).collect()
    }

    #[test]
    fn what_was_saved_is_read_also_if_it_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let whole = measurement("total_ms", &[("g", "a", &[1.0, 2.0]), ("g", "b", &[3.0])]);
        let mut log = Log::open(false, Some(&path)).unwrap();
        lines(&whole).iter().for_each(|line| log.write(line).unwrap());
        assert_eq!(read(&path).unwrap(), std::slice::from_ref(&whole));

        // Cut off in the middle of its third line, and then continued with another measurement.
        let text = fs::read_to_string(&path).unwrap();
        let third = text.match_indices('\n').nth(2).unwrap().0;
        fs::write(&path, &text[..third - 5]).unwrap();
        let cut = &read(&path).unwrap()[0];
        assert_eq!((cut.runs.len(), &cut.end), (1, &None));
        let mut log = Log::open(false, Some(&path)).unwrap();
        lines(&whole).iter().for_each(|line| log.write(line).unwrap());
        let both = read(&path).unwrap();
        assert_eq!((both.len(), both[0].runs.len(), &both[1]), (2, 1, &whole));
    }

    #[test]
    fn files_of_others_are_refused() {
        for text in ["", "{}\n", "hello\n", "{\"line\":\"end\",\"interrupted\":false,\"summary\":[]}\n"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        let whole = measurement("total_ms", &[("g", "a", &[1.0])]);
        let text = |lines: &[Line]| -> String {
            lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect()
        };
        let mut stranger = lines(&whole);
        let Line::Run(run) = &mut stranger[1] else { panic!("a run") };
        run.contender = 1;
        assert!(parse(&text(&stranger)).is_err(), "a contender that is not in the head");
        let mut late = lines(&whole);
        let Line::Run(run) = &mut late[1] else { panic!("a run") };
        run.round = 1;
        assert!(parse(&text(&late)).is_err(), "a round that was not to be");
        let mut endless = whole.clone();
        endless.head.rounds = u32::MAX;
        assert!(parse(&text(&lines(&endless))).is_err());
        let mut old = whole.clone();
        old.head.format = 1;
        assert!(parse(&text(&lines(&old))).unwrap_err().to_string().contains("format 1"));
    }
}
