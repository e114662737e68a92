//! The program's commands do what the README says, for people and for programs.

use migration::monitor::Phase;
use std::process::Command;
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::command::{run, run_command};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, hop, receiver, request, wait_until};

#[path = "../../vmm/tests/common/elf.rs"]
mod elf;

fn api(node: &Node) -> &str {
    node.api_path().to_str().unwrap()
}

#[test]
fn status_and_migrate() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "swift");
    let (mut next, address) = receiver(folder.path(), "next");
    let api = api(&guest);
    let ran = run(["status", "--api", api]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.starts_with("swift: running, 1 vCPU, 32.0 MiB, process "), "{ran:?}");
    let status = run(["status", "--api", api, "--json"]).json();
    assert_eq!(status["vm"]["state"], "running");
    assert_eq!(status["vm"]["guest"]["clean"], true);
    assert!(status["migration"].is_null());

    let ran = run(["migrate", "--api", api, "--json", "--to", &address.to_string()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.is_empty(), "no progress where there is no terminal: {ran:?}");
    let report = &ran.json()["report"];
    assert_eq!(report["verdict"], "moved");
    // Its RAM, and the small program that it boots from.
    let memory = report["memory"].as_u64().unwrap();
    assert!((32 << 20..33 << 20).contains(&memory), "{memory}");
    assert_eq!(report["transport"], "tcp");
    assert!(report["testimony"]["clean"].as_bool().unwrap());
    assert!(report["rounds"].as_array().unwrap().len() >= 2);
    let spans: Vec<_> = report["spans"].as_array().unwrap().iter().map(|span| span["name"].clone()).collect();
    for name in ["pause", "last pages", "save state", "destination: load state", "destination: run"] {
        assert!(spans.iter().any(|span| span == name), "no span {name:?} in {spans:?}");
    }
    let parts: u64 = report["spans"].as_array().unwrap().iter().filter_map(|span| span["us"].as_u64()).sum();
    let blackout = report["blackout_us"].as_u64().unwrap();
    assert!(parts <= blackout && blackout > 0, "the spans are parts of the blackout: {report}");

    next.expect("arrived").unwrap();
    let (_last, address) = receiver(folder.path(), "last");
    let ran = run(["migrate", "--api", self::api(&next), "--to", &address.to_string()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    for part in ["moved to", "blackout", "untouched", "the guest:", "all right", "longest gap"] {
        assert!(ran.stdout.contains(part), "no {part:?} in {}", ran.stdout);
    }
    say::figures("status and migrate", "text and JSON");
}

#[test]
fn machines_by_configuration_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let vm =
        file("vm.toml", "memory = '512G'\nvcpus = 2\nworking-set = '2M'\nserial = 'none'\nname = 'file'\n");
    let waiting = file("waiting.toml", "listen = '127.0.0.1:0'\nserial = 'none'\nonce = true\n");
    let mut guest =
        Node::start(whimbrel(), folder.path(), "line", ["run", "--config", &vm, "--memory", "32M"]).unwrap();
    guest.expect("running").unwrap();
    guest.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running").unwrap();
    let status = guest.status().unwrap();
    assert_eq!((status.memory, status.vcpus, status.name.as_str()), (32 << 20, 2, "line"));
    let mut next = Node::start(whimbrel(), folder.path(), "next", ["receive", "--config", &waiting]).unwrap();
    let listening = next.expect("listening").unwrap();
    hop(&guest, &mut next, listening["address"].as_str().unwrap().parse().unwrap());
    assert_runs(&next);
    settle(&next, &Guest { vcpus: 2, ..Guest::SMALL });
    say::figures("machines by configuration files", "run and received; the command line wins");
}

#[test]
fn a_detached_migration_is_watched_by_status() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (mut next, address) = receiver(folder.path(), "next");
    let proxy = Proxy::start(address, Rules { data_delay: Duration::from_millis(5), ..Rules::default() });
    let to = proxy.address().to_string();
    let ran =
        run(["migrate", "--api", api(&guest), "--detach", "--json", "--on-stall", "switch", "--to", &to]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.json()["number"], 1);
    let ran = run(["status", "--api", api(&guest)]);
    assert!(ran.stdout.contains("migrating") && ran.stdout.contains("moving to"), "{ran:?}");
    guest.wait_migration(PATIENCE).unwrap();
    next.expect("arrived").unwrap();
    assert_runs(&next);
    settle(&next, &Guest::SMALL);
    say::figures("a detached migration", "watched by status");
}

#[test]
fn progress_shows_on_a_terminal() {
    if run_command(Command::new("script").arg("--version")).code != Some(0) {
        say::skipped("progress on a terminal", "there is no `script`; install bsdutils");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (_next, address) = receiver(folder.path(), "next");
    let proxy = Proxy::start(address, Rules { data_delay: Duration::from_millis(5), ..Rules::default() });
    let program = whimbrel().to_str().unwrap();
    let command =
        format!("'{program}' migrate --api '{}' --on-stall switch --to {}", api(&guest), proxy.address());
    let ran = run_command(Command::new("script").args(["-qec", &command, "/dev/null"]).env("TERM", "xterm"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("round 0") && ran.stdout.contains("expected"), "{ran:?}");
    assert!(ran.stdout.contains("moved to"), "{ran:?}");
    say::figures("progress", "shows on a terminal");
}

/// The destination dies after it was told to run the guest and before it could say that it does.
#[test]
fn a_held_guest() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (mut next, address) = receiver(folder.path(), "next");
    let rules = Rules { control_delay: Duration::from_millis(400), ..Rules::default() };
    let proxy = Proxy::start(address, rules);
    let to = proxy.address().to_string();
    let (api, socket) = (api(&guest), api(&guest).to_string());
    let migrating = std::thread::spawn(move || run(["migrate", "--api", &socket, "--to", &to]));
    wait_until("the hand-over", || {
        guest.migration().is_ok_and(|migration| migration.progress.phase == Phase::Committed)
    });
    run(["cancel", "--api", api]).refused(1, "too late");
    next.kill().unwrap();
    let ran = migrating.join().unwrap();
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stdout.contains("HELD") && ran.stdout.contains("resume --force"), "{ran:?}");
    let ran = run(["status", "--api", api]);
    assert!(ran.stdout.starts_with("guest: held"), "{ran:?}");
    run(["resume", "--api", api]).refused(1, "force");
    run(["migrate", "--api", api, "--to", "localhost:1"]).refused(1, "held");
    assert_eq!(run(["resume", "--api", api, "--force"]).code, Some(0));
    assert_runs(&guest);
    settle(&guest, &Guest::SMALL);
    say::figures("a held guest", "exit code 4, resumed by force");
}

#[test]
fn how_processes_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, code: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, elf::pvh_elf(code)).unwrap();
        path.to_str().unwrap().to_string()
    };
    let run_guest =
        |kernel: &str| run(["run", "--memory", "16M", "--serial", "none", "--json", "--kernel", kernel]);
    // mov dx, 0x604; mov ax, 0x2000; out dx, ax
    let powers_off = file("off", &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4]);
    assert_eq!(run_guest(&powers_off).code, Some(0));
    // lidt [zeros]; ud2: a fault while handling a fault while handling a fault
    let crashes = file("crash", &[0x0f, 0x01, 0x1d, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x0b]);
    let ran = run_guest(&crashes);
    assert_eq!(ran.code, Some(5), "{ran:?}");
    assert!(ran.stdout.contains("crashed"), "{ran:?}");

    let mut guest = Guest::SMALL.start(folder.path(), "guest");
    assert_eq!(run(["quit", "--api", api(&guest)]).code, Some(0));
    assert_eq!(guest.wait_exit(PATIENCE).unwrap().code(), Some(0));
    assert!(!guest.api_path().exists(), "the socket stays behind");
    let mut guest = Guest::SMALL.start(folder.path(), "terminated");
    // The shell's own: a small Debian has no program of that name.
    let kill = format!("kill {}", guest.pid());
    assert_eq!(run_command(Command::new("sh").args(["-c", &kill])).code, Some(0));
    assert_eq!(guest.wait_exit(PATIENCE).unwrap().code(), Some(0));
    assert!(!guest.api_path().exists(), "the socket stays behind");

    let (mut once, address) = Node::receiver(whimbrel(), folder.path(), "once", ["--once"]).unwrap();
    let guest = Guest::SMALL.start(folder.path(), "once-only");
    let proxy = Proxy::start(address, Rules { data_delay: Duration::from_millis(50), ..Rules::default() });
    guest.migrate(&request(proxy.address())).unwrap();
    wait_until("pre-copy", || guest.migration().unwrap().progress.sent > 0);
    guest.cancel().unwrap();
    once.expect("refused").unwrap();
    assert_eq!(once.wait_exit(PATIENCE).unwrap().code(), Some(1), "receive --once after a failure");
    say::figures(
        "how processes end",
        "powered off 0, crashed 5, quit 0, terminated 0, --once after a failure 1",
    );
}

#[test]
fn the_doctor() {
    let ran = run(["doctor", "--json"]);
    let report = ran.json();
    let healthy = report["healthy"].as_bool().unwrap();
    assert_eq!(ran.code, Some(if healthy { 0 } else { 1 }), "{ran:?}");
    let findings = report["findings"].as_array().unwrap();
    assert!(findings.len() > 3 && findings.iter().all(|f| f["found"].is_string()), "{report}");
    assert!(findings.iter().any(|f| f["what"] == "seccomp" && f["level"] == "good"), "{report}");
    assert!(findings.iter().any(|f| f["what"] == "Landlock"), "{report}");
    let ran = run(["doctor"]);
    assert!(ran.stdout.contains("/dev/kvm") && ran.stderr.is_empty(), "{ran:?}");
    let ran = run(["doctor", "--memory", "900G", "--json"]);
    assert_eq!((ran.code, ran.json()["healthy"].as_bool()), (Some(1), Some(false)), "{ran:?}");
    say::figures("the doctor", format_args!("{} findings", findings.len()));
}

#[test]
fn the_demo() {
    let small = ["demo", "--memory", "32M", "--working-set", "4M", "--moves", "2"];
    let ran = run(small.iter().chain(&["--json"]));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    let story = ran.json();
    assert_eq!(story["moves"].as_array().unwrap().len(), 2);
    assert_eq!(story["guest"]["clean"], true);
    assert!(story["moves"][0]["report"]["testimony"]["pages"].as_u64().unwrap() > 0);
    let ran = run(small);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("no page wrong, no timer lost, time never ran backwards"), "{ran:?}");
    // A demo with a limit that no switchover can keep says that its guest has stayed.
    let ran = run(small.iter().chain(&["--downtime-limit", "1ms"]));
    assert_eq!(ran.code, Some(3), "{ran:?}");
    say::figures("the demo", "text and JSON, and one that stays");
}

#[test]
fn completions_and_man_pages() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ran = run(["completions", shell]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains("migrate") && ran.stdout.contains("downtime-limit"), "{shell}");
        if shell == "bash" {
            let script = folder.path().join("completions");
            std::fs::write(&script, ran.stdout).unwrap();
            assert_eq!(run_command(Command::new("bash").arg("-n").arg(script)).code, Some(0));
        }
    }
    let pages = folder.path().join("man");
    let ran = run(["man", pages.to_str().unwrap()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for page in ["whimbrel.1", "whimbrel-run.1", "whimbrel-receive.1", "whimbrel-migrate.1"] {
        let text = std::fs::read_to_string(pages.join(page)).unwrap();
        assert!(text.contains(".TH") && text.contains(".SH EXAMPLES") && !text.contains("EXTRA"), "{page}");
    }
    // The examples are those of --help.
    let page = std::fs::read_to_string(pages.join("whimbrel-evacuate.1")).unwrap();
    let help = run(["evacuate", "--help"]).stdout;
    let examples: Vec<_> = help.lines().filter_map(|line| line.strip_prefix("    whimbrel ")).collect();
    assert!(examples.len() >= 2, "{help}");
    for example in examples {
        assert!(page.replace('\\', "").contains(example), "{example}: {page}");
    }
    say::figures("completions and man pages", "3 shells, a page for each command");
}
