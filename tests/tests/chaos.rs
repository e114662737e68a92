//! A short part of `ci/chaos`.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;

const MOVES: u64 = 20;

#[test]
fn twenty_moves_in_which_things_go_wrong() {
    // Says what to do if it is missing or old.
    let _ = whimbrel();
    let logs = concat!(env!("CARGO_TARGET_TMPDIR"), "/chaos");
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos"));
    command.args(["--longest", "1", "--json", "--logs", logs, "--moves", &MOVES.to_string()]);
    // However long it takes on a busy machine: each step of it has an end.
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("this needs root") {
        say::skipped("chaos", stderr);
        return;
    }
    assert!(output.status.success(), "{stderr}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["moves"], MOVES);
    assert_eq!(told["violations"].as_array().map(Vec::len), Some(0));
    say::figures("chaos", format_args!("seed {}: {}; {}", told["seed"], told["faults"], told["outcomes"]));
}

/// The file in which a run says what it has done so far, as soon as there is one.
fn summary(of: u32) -> Option<PathBuf> {
    let child = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).ok()?;
    let words =
        std::fs::read_to_string(format!("/proc/{}/cmdline", child.split_whitespace().next()?)).ok()?;
    let folder = words.split('\0').skip_while(|word| *word != "--inside").nth(1)?;
    Some(PathBuf::from(folder).join("summary"))
}

#[test]
fn a_run_that_is_ended_at_once_tells_what_it_has_done() {
    let _ = whimbrel();
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos"));
    command.args(["--longest", "1", "--json", "--moves", "100000"]);
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let moves = |path: PathBuf| {
        let told: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        told["moves"].as_u64()
    };
    let mut done = 0;
    loop {
        // From the second signal on, whatever it is doing is not waited for.
        if done > 0 {
            // SAFETY: takes numbers only; the process is a child that has not been waited for.
            unsafe { libc::kill(run.id() as libc::pid_t, libc::SIGTERM) };
        }
        std::thread::sleep(Duration::from_millis(60));
        done = summary(run.id()).and_then(moves).unwrap_or(done);
        if run.try_wait().unwrap().is_some() {
            break;
        }
    }
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("this needs root") {
        say::skipped("chaos", stderr);
        return;
    }
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{stderr}"));
    assert!(told["moves"].as_u64() >= Some(done) && done > 0, "{told}: {stderr}");
    assert!(told["faults"].is_object() && told["violations"].is_array(), "{told}");
}
