//! What the process of a virtual machine can no longer do, seen from outside and tried from inside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use whimbrel::node::Node;
use whimbrel_tests::inject::{Outcome, system_call, thread};
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, request, wait_until};

/// The capabilities that threads keep which may build a machine or move one: DAC_OVERRIDE, DAC_READ_SEARCH,
/// NET_BIND_SERVICE, NET_ADMIN, IPC_LOCK and SYS_PTRACE.
const KEPT: u64 = 1 << 1 | 1 << 2 | 1 << 10 | 1 << 12 | 1 << 14 | 1 << 19;

const ON: [&str; 2] = ["--seccomp", "on"];

const REFUSED: Outcome = Outcome::Returned(-(libc::ENOSYS as i64));
/// What a call says that looks at the address 1.
const CARRIED_OUT: Outcome = Outcome::Returned(-(libc::EFAULT as i64));

fn start(folder: &tempfile::TempDir, more: &[&str]) -> Node {
    Guest::SMALL.start_by(whimbrel(), &[&["--rng"], more].concat(), folder.path(), "guest")
}

/// A thread's status by its fields.
type Status = BTreeMap<String, String>;

fn threads(node: &Node) -> Vec<Status> {
    let tasks = fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap().flatten();
    // One may end while it is looked at.
    let texts = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = |text: String| {
        let fields = text.lines().filter_map(|line| line.split_once(":\t"));
        fields.map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    texts.map(fields).collect()
}

/// Threads of the kernel's own, which make no system calls, are named after what they do for KVM.
fn serves_a_guest(status: &Status) -> bool {
    ["vcpu", "rng.", "kvm-"].iter().any(|name| status["Name"].starts_with(name))
}

fn is_confined(status: &Status) -> bool {
    let filters = if serves_a_guest(status) { "3" } else { "2" };
    let allowed = if serves_a_guest(status) { 0 } else { KEPT };
    let capabilities = ["CapInh", "CapPrm", "CapEff", "CapAmb"];
    (status["Seccomp"].as_str(), status["Seccomp_filters"].as_str()) == ("2", filters)
        && status["NoNewPrivs"] == "1"
        && capabilities.iter().all(|set| u64::from_str_radix(&status[*set], 16).unwrap() & !allowed == 0)
}

/// Waits until every thread of a process is confined: those that end with a migration may still have been
/// started with more.
fn assert_confined(node: &Node) {
    assert!(threads(node).iter().filter(|status| serves_a_guest(status)).count() >= 2);
    wait_until("confinement of all threads", || threads(node).iter().all(is_confined));
}

#[test]
fn every_thread_is_confined_before_and_after_a_move() {
    let folder = tempfile::tempdir().unwrap();
    let guest = start(&folder, &ON);
    let (mut next, address) = Node::receiver(whimbrel(), folder.path(), "next", ON).unwrap();
    for status in threads(&next) {
        assert_eq!((status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()), ("2", "1"), "{status:?}");
    }
    assert_confined(&guest);
    guest.migrate(&request(address)).unwrap();
    next.expect("arrived").unwrap();
    // Nobody has seen the report: the source is still there.
    for status in threads(&guest) {
        assert!(serves_a_guest(&status) || is_confined(&status), "{status:?}");
    }
    assert_confined(&next);
    assert_runs(&next);
    say::figures("every thread is confined", "at the source, a receiver and a destination");
}

#[test]
fn calls_that_take_over_hosts_end_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let calls = [
        ("vcpu0", libc::SYS_execve, [1, 1, 1]),
        ("rng.0", libc::SYS_execve, [1, 1, 1]),
        ("api", libc::SYS_execveat, [1, 1, 1]),
        ("signals", libc::SYS_ptrace, [libc::PTRACE_SEIZE as u64, 1, 0]),
        ("signals", libc::SYS_bpf, [0, 1, 1]),
        ("api", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0]),
        ("api", libc::SYS_setuid, [0, 0, 0]),
        ("vcpu0", libc::SYS_ioctl, [0, libc::TIOCSTI, 1]),
    ];
    for (name, call, arguments) in calls {
        let mut guest = start(&folder, &ON);
        let outcome = system_call(thread(guest.pid(), name), call, arguments);
        assert_eq!(outcome, Outcome::Killed(libc::SIGSYS), "call {call} by {name}");
        assert_eq!(guest.wait_exit(PATIENCE).unwrap().signal(), Some(libc::SIGSYS));
    }
    say::figures("calls that take over hosts", format_args!("{} killed the process", calls.len()));
}

#[test]
fn calls_that_nobody_needs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let guest = start(&folder, &ON);
    let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    // Of the x32 ABI, which has numbers of its own.
    let x32_execve = 0x4000_0000 | 520;
    let calls = [
        ("vcpu0", libc::SYS_openat, [0, 1, 0]),
        ("rng.0", libc::SYS_openat, [0, 1, 0]),
        ("vcpu0", libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]),
        ("vcpu0", libc::SYS_mmap, [0, 4096, code]),
        ("vcpu0", libc::SYS_seccomp, [0, 0, 0]),
        ("vcpu0", libc::SYS_io_uring_setup, [1, 1, 0]),
        ("api", libc::SYS_clone3, [1, 88, 0]),
        ("api", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0]),
        ("api", libc::SYS_fork, [0, 0, 0]),
        ("api", libc::SYS_kill, [1, 0, 0]),
        ("api", libc::SYS_tgkill, [1, 1, 0]),
        ("api", libc::SYS_prlimit64, [1, 0, 0]),
        ("api", libc::SYS_socket, [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0]),
        ("api", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 9, 0]),
        ("api", x32_execve, [1, 1, 1]),
    ];
    for (name, call, arguments) in calls {
        let outcome = system_call(thread(guest.pid(), name), call, arguments);
        assert_eq!(outcome, REFUSED, "call {call} by {name}");
    }
    // What is needed later is still there.
    assert_eq!(system_call(thread(guest.pid(), "api"), libc::SYS_openat, [0, 1, 0]), CARRIED_OUT);
    assert_runs(&guest);
    say::figures("calls that nobody needs", format_args!("{} refused; the guest runs on", calls.len()));
}

#[test]
fn lists_can_be_tried_and_done_without() {
    let folder = tempfile::tempdir().unwrap();
    for (mode, seccomp, no_new_privileges) in [("log", "2", "1"), ("off", "0", "0")] {
        let guest = start(&folder, &["--seccomp", mode]);
        for status in threads(&guest).iter().filter(|status| !status["Name"].starts_with("kvm-")) {
            assert_eq!(status["Seccomp"], seccomp, "{status:?}");
            assert_eq!(status["NoNewPrivs"], no_new_privileges, "{status:?}");
        }
        let vcpu = thread(guest.pid(), "vcpu0");
        assert_eq!(system_call(vcpu, libc::SYS_openat, [0, 1, 0]), CARRIED_OUT, "{mode}");
        assert_eq!(system_call(vcpu, libc::SYS_execve, [1, 1, 1]), CARRIED_OUT, "{mode}");
        wait_until("the guest's work", || guest.status().is_ok());
        assert_runs(&guest);
    }
    say::figures("lists", "tried by --seccomp log, done without by --seccomp off");
}
