//! A QEMU guest, which a script moves.
//!
//! The script takes `--mib`, `--uri`, `--multifd`, `--fill random|zero` and `--prefault`. It prints one line
//! of JSON with
//! `status`, `mib`, `total_s`, `cpu_source_s` and `cpu_target_s`.

use super::free_port;
use crate::figures::{self, Figures};
use crate::guest::{Content, Guest};
use anyhow::{Context, bail};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// Moves a guest like `guest` and returns the script's result.
///
/// # Errors
/// When the script or its migration fails.
pub fn run(script: &Path, guest: &Guest, multifd: u16, prefault: bool) -> anyhow::Result<Value> {
    let mut command = Command::new(script);
    command
        .args(["--mib", &(guest.memory >> 20).to_string()])
        .args(["--fill", if guest.content == Content::Zero { "zero" } else { "random" }])
        .args(["--uri", &format!("tcp:127.0.0.1:{}", free_port()?)])
        .args(["--multifd", &multifd.to_string()]);
    if prefault {
        command.arg("--prefault");
    }
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", script.display()))?;
    parse(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("{}: {}", script.display(), String::from_utf8_lossy(&output.stderr)))
}

fn parse(output: &str) -> anyhow::Result<Value> {
    let line = output.lines().rfind(|line| line.starts_with('{')).context("it printed no JSON")?;
    let said: Value = serde_json::from_str(line).context("it printed no JSON")?;
    if said["status"] != "completed" {
        bail!("QEMU's migration did not succeed: {line}");
    }
    Ok(said)
}

/// MiB a second and CPU seconds of both sides per GiB. The rate is guest memory over QEMU's own `total-time`,
/// which runs from the command to the end of the migration and includes the set-up.
pub fn figures(said: &Value) -> Figures {
    let seconds = said["total_s"].as_f64().filter(|s| *s > 0.0);
    let mib = said["mib"].as_f64();
    let per_gib = |name: &str| Some(said[name].as_f64()? / (mib? / 1024.0));
    figures::named([
        ("migration_mib_s", mib.zip(seconds).map(|(mib, s)| mib / s)),
        ("moving_ms", seconds.map(|s| s * 1e3)),
        ("source_cpu_s_per_gib", per_gib("cpu_source_s")),
        ("target_cpu_s_per_gib", per_gib("cpu_target_s")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_line_is_read() {
        let line = r#"{"status": "completed", "mib": 2048, "total_s": 2.0, "cpu_source_s": 1.0}"#;
        let said = parse(&format!("a warning\n{line}\n")).unwrap();
        let figures = figures(&said);
        assert_eq!((figures["migration_mib_s"], figures["moving_ms"]), (1024.0, 2000.0));
        assert_eq!(figures.get("source_cpu_s_per_gib"), Some(&0.5));
        assert_eq!(figures.get("target_cpu_s_per_gib"), None);
        assert!(parse("").is_err());
        assert!(parse(r#"{"status": "failed"}"#).is_err());
    }
}
