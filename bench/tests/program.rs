//! The program as users run it. On transports alone, which need no KVM: a measurement that is killed or
//! interrupted loses no runs, and saved measurements can be shown, compared and drawn. With guests: moves
//! through TLS are measured beside plain ones.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_whimbrel-bench");

/// Runs of a transport that are too short for their figures to mean anything.
const SHORT_RUNS: [&str; 7] = ["transport", "-t", "0.05", "-m", "16M", "-P", "1"];

fn run(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).output().expect("the program")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Starts a long measurement that saves its runs in `path`; returns when the file has `lines` lines.
fn measuring(path: &Path, lines: usize) -> Child {
    let child = Command::new(PROGRAM)
        .args(SHORT_RUNS)
        .args(["-l", "64K,4K", "--rounds", "1000", "--save"])
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program");
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(path).map_or(0, |text| text.lines().count()) < lines {
        assert!(Instant::now() < deadline, "no runs");
        thread::sleep(Duration::from_millis(10));
    }
    child
}

/// The process of the server that a measurement has started.
fn server_of(child: &Child) -> String {
    let path = format!("/proc/{0}/task/{0}/children", child.id());
    fs::read_to_string(path).unwrap().split_whitespace().next().expect("a server").to_string()
}

#[test]
fn what_is_cut_off_keeps_its_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    let mut child = measuring(&path, 4);
    let server = server_of(&child);
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(format!("/proc/{server}/cmdline")).is_ok_and(|line| line.contains("--server")) {
        assert!(Instant::now() < deadline, "the server outlives its client");
        thread::sleep(Duration::from_millis(10));
    }
    let saved = fs::read_to_string(&path).unwrap().lines().count();
    let shown = run(&["show", path.to_str().unwrap()]);
    assert!(shown.status.success(), "{shown:?}");
    let shown = text(&shown);
    assert!(shown.contains("CUT OFF"), "{shown}");
    let completed: usize = shown.split(' ').nth(2).and_then(|n| n.parse().ok()).expect("a number of runs");
    // The head is a line too, and the last line may be incomplete.
    assert!(completed >= 3 && completed + 2 >= saved, "{saved} lines, {shown}");
}

#[test]
fn an_interrupt_ends_it_with_a_summary() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    let child = measuring(&path, 3);
    // SAFETY: the signal goes to a child of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("interrupted: what follows"), "{}", text(&output));
    let last = fs::read_to_string(&path).unwrap().lines().last().unwrap().to_string();
    assert!(last.contains(r#""line":"end""#) && last.contains("stream_mib_s"), "{last}");
}

#[test]
fn what_was_saved_is_compared_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (saved, page) = (file("runs.jsonl"), file("page.html"));
    let three_rounds = ["-l", "64K", "--rounds", "3", "--save", &saved];
    let measured = run(&[&SHORT_RUNS[..], &three_rounds].concat());
    assert!(measured.status.success(), "{measured:?}");
    assert!(text(&measured).contains("3 of 3 runs completed"), "{}", text(&measured));
    let same = run(&["compare", &saved, &saved]);
    assert!(same.status.success() && text(&same).contains("0 of "), "{}", text(&same));
    // The same runs, but with a hundredth of every rate and a hundred times every time.
    let slower: Vec<String> = fs::read_to_string(&saved).unwrap().lines().map(slowed).collect();
    let slow = file("slow.jsonl");
    fs::write(&slow, slower.join("\n") + "\n").unwrap();
    let worse = run(&["compare", &saved, &slow, "--json"]);
    let differences: serde_json::Value = serde_json::from_slice(&worse.stdout).unwrap();
    let all = differences.as_array().unwrap();
    // With three runs each, chance explains any difference in one case of ten.
    assert!(all.iter().all(|d| d["chance"].as_f64().unwrap() >= 0.1 && d["verdict"] == "none"), "{all:?}");
    assert!(all.iter().any(|d| d["ratio"]["median"].as_f64().unwrap() < 0.02), "{all:?}");
    assert!(run(&["report", &saved, "-o", &page]).status.success());
    let page = fs::read_to_string(page).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("<svg"));
    let absent = run(&["show", &file("absent")]);
    assert!(!absent.status.success());
}

/// Moves of guests that are too small for their figures to mean anything.
#[test]
fn tls_is_measured_beside_plain() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    let measure = |line: &str| {
        let mut args: Vec<&str> = line.split_whitespace().collect();
        args.extend(["--save", path.to_str().unwrap()]);
        let measured = run(&args);
        assert!(measured.status.success(), "{measured:?}");
        text(&measured)
    };
    let rates = measure("throughput --tls -m 192M --rounds 1 --no-warm-up");
    let delays = measure("blackout --tls -m 96M --rounds 1");
    assert!(rates.contains("share of the bound") && delays.contains("set-up, ms more"), "{rates}{delays}");
    for said in [&rates, &delays] {
        let row = said.lines().find(|line| line.contains("TLS 1.3 in")).expect("how it was encrypted");
        assert!(!row.contains('–'), "everything was measured: {said}");
    }
    let saved = fs::read_to_string(&path).unwrap();
    let runs: Vec<serde_json::Value> = saved
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["line"] == "run")
        .collect();
    let encrypted = |run: &serde_json::Value| {
        let lanes = run["said"]["lanes"].as_array()?;
        Some(lanes.iter().all(|lane| lane["encryption"] != "none"))
    };
    // Plain, TLS, and the processor alone; then plain and TLS.
    let all: Vec<Option<bool>> = runs.iter().map(encrypted).collect();
    assert_eq!(all, [Some(false), Some(true), None, Some(false), Some(true)], "{saved}");
    let shown = run(&["show", path.to_str().unwrap()]);
    assert_eq!(text(&shown).matches("beside plain in the same round").count(), 2, "{shown:?}");
}

/// Every test of the transport and both references, over the lab's devices, with runs too short to mean
/// anything.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn rdma_is_measured_in_every_way_beside_perftest() {
    let peer = std::env::var("LAB_PEER").expect("no LAB_PEER: this test runs in the lab, by `ci/rdma`");
    // For both sides of two sessions, since the previous session's pages are freed in the background.
    fs::write("/proc/sys/vm/nr_hugepages", "80").expect("huge pages");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    let options = "transport --transport rdma -m 32M -P 2 -l 64K -t 0.3 --rounds 1 --perftest \
                   --completion channel,busy-poll --depth 0,4 --page-size 4k,2m --chunk 2M,16M";
    let mut args: Vec<&str> = options.split_whitespace().collect();
    args.extend(["--bind", &peer, "--save", path.to_str().unwrap()]);
    let measured = run(&args);
    assert!(measured.status.success(), "{measured:?}");
    let saved = fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> =
        saved.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let figures = |line: &str, id: &str| {
        let has = |one: &&serde_json::Value| one["line"] == line && one["figures"][id].as_f64() > Some(0.0);
        lines.iter().filter(has).count()
    };
    // Bandwidth: two completion modes by two depths, and ib_write_bw. Latency: a barrier and a message in two
    // modes each, and ib_write_lat for both. Registration: two sizes of chunks by two of pages.
    assert_eq!(figures("run", "stream_mib_s"), 5, "{saved}");
    assert_eq!(figures("run", "latency_us"), 6, "{saved}");
    assert_eq!(figures("run", "registered_ms_per_gib"), 4, "{saved}");
    let refused = run(&["transport", "--transport", "tcp", "--test", "registration"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--transport rdma"), "{refused:?}");
}

/// The line with slower figures.
fn slowed(line: &str) -> String {
    let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
    for (name, figure) in line["figures"].as_object_mut().into_iter().flatten() {
        let factor = if name.ends_with("_s") { 0.01 } else { 100.0 };
        *figure = (figure.as_f64().unwrap() * factor).into();
    }
    line.to_string()
}
