//! A short part of `ci/chaos`.

use serde_json::Value;
use std::process::Command;
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
