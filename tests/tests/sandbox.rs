//! What the process of a virtual machine can no longer do, seen from outside and tried from inside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use whimbrel::node::Node;
use whimbrel_tests::inject::{Outcome, open, system_call, thread};
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, request, wait_until};

/// The capability that threads keep which may move a machine: IPC_LOCK.
const KEPT: u64 = 1 << 14;

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
    ["vcpu", "rng.", "disk.", "kvm-", "iou-"].iter().any(|name| status["Name"].starts_with(name))
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
    let guest = start(&folder, &[]);
    let (mut next, address) = Node::receiver(whimbrel(), folder.path(), "next", [""; 0]).unwrap();
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
        let mut guest = start(&folder, &[]);
        let outcome = system_call(thread(guest.pid(), name), call, arguments);
        assert_eq!(outcome, Outcome::Killed(libc::SIGSYS), "call {call} by {name}");
        assert_eq!(guest.wait_exit(PATIENCE).unwrap().signal(), Some(libc::SIGSYS));
        let said = guest.stderr();
        let expected = format!("the thread \"{name}\" was about to make system call {call} (");
        assert!(said.contains(&expected) && said.contains("--seccomp off"), "{said}");
        assert!(!said.contains("unknown"), "{said}");
    }
    say::figures("calls that take over hosts", format_args!("{} killed the process", calls.len()));
}

#[test]
fn calls_that_nobody_needs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let guest = start(&folder, &[]);
    let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    // Of the x32 ABI, which has numbers of its own.
    let x32_execve = 0x4000_0000 | 520;
    let calls = [
        ("vcpu0", libc::SYS_openat, [0, 1, 0]),
        ("rng.0", libc::SYS_openat, [0, 1, 0]),
        ("vcpu0", libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]),
        ("vcpu0", libc::SYS_mmap, [0, 4096, code]),
        ("vcpu0", libc::SYS_seccomp, [0, 0, 0]),
        ("vcpu0", libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0]),
        ("api", libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0]),
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
fn files_that_nobody_needs_cannot_be_opened() {
    if let Err(error) = vmm::sandbox::landlock() {
        return say::skipped("which files can be opened", format_args!("no Landlock ({error})"));
    }
    let folder = tempfile::tempdir().unwrap();
    let disks = tempfile::tempdir().unwrap();
    let (image, other) = (disks.path().join("image"), folder.path().join("other"));
    for path in [&image, &other] {
        fs::write(path, [0; 4096]).unwrap();
    }
    let disk = format!("{},cached", image.display());
    let record = folder.path().join("record");
    let record = record.to_str().unwrap();
    let guest = start(&folder, &["--disk", &disk, "--record", record, "--journal", "1"]);
    let below = ["--disks", disks.path().to_str().unwrap()];
    let (next, _) = Node::receiver(whimbrel(), folder.path(), "next", below).unwrap();
    let denied = Outcome::Returned(-i64::from(libc::EACCES));
    let outcome = |node: &Node, path: &Path, flags| open(thread(node.pid(), "api"), path, flags);
    let opened = |node, path, flags| {
        let outcome = outcome(node, path, flags);
        assert!(matches!(outcome, Outcome::Returned(fd) if fd >= 0), "{}: {outcome:?}", path.display());
    };
    let hosts = Path::new("/etc/hosts");
    for node in [&guest, &next] {
        assert_eq!(outcome(node, &other, libc::O_RDONLY), denied);
        assert_eq!(outcome(node, &folder.path().join("new"), libc::O_WRONLY | libc::O_CREAT), denied);
        assert_eq!(outcome(node, Path::new(record), libc::O_RDONLY), denied, "it is open already");
        assert_eq!(outcome(node, hosts, libc::O_WRONLY | libc::O_APPEND), denied);
        assert_eq!(outcome(node, Path::new("/dev/net/tun"), libc::O_RDWR), denied);
        opened(node, hosts, libc::O_RDONLY);
    }
    // A disk is open already at the source, and may be opened by a guest that arrives.
    assert_eq!(outcome(&guest, &image, libc::O_RDWR), denied);
    opened(&next, &image, libc::O_RDWR);
    assert_runs(&guest);
    say::figures("files that nobody needs", "cannot be opened by a source or a receiver");
}

#[test]
fn images_of_other_users_are_opened_before_privileges_are_given_up() {
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&image, Some(NOBODY), Some(NOBODY)).unwrap();
    let disk = format!("{},cached", image.display());
    let guest = start(&folder, &["--disk", &disk, "--journal", "1"]);
    assert_confined(&guest);
    assert_runs(&guest);
    // Whoever has it is named, although a confined process may not look at another one.
    let refused = Command::new(whimbrel()).args(["run", "--journal", "1", "--disk", &disk]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {}", guest.pid())), "{said}");
}

/// A disk of 300 MiB with a kernel of `len` zeros, by a link whose target is beside its inode.
fn boot_disk(folder: &Path, len: u64) -> PathBuf {
    let (root, image) = (folder.join("root"), folder.join("disk"));
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("boot")).unwrap();
    fs::File::create(root.join("boot/vmlinuz-1")).unwrap().set_len(len).unwrap();
    let target = format!("{}boot/vmlinuz-1", "./".repeat(40));
    std::os::unix::fs::symlink(target, root.join("vmlinuz")).unwrap();
    let size = "300M";
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).args([&root, &image]).arg(size).output();
    assert!(made.unwrap().status.success());
    image
}

fn run_from(image: &Path) -> Command {
    let mut command = Command::new(whimbrel());
    command.args(["run", "--serial", "none", "--disk", &format!("{},cached", image.display())]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The process that reads a disk for another one, which is stopped before it has all of the kernel.
fn reader(of: u32) -> Option<u32> {
    let path = format!("/proc/{of}/task/{of}/children");
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let children = fs::read_to_string(&path).unwrap_or_default();
        // Without an address space there is none any more; with few filters it has not begun yet.
        let child = children.split_whitespace().next().and_then(|id| id.parse().ok());
        let seccomp = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/status"))
                .is_ok_and(|status| status.lines().any(|line| line == "Seccomp:\t2"))
        };
        if let Some(child) = child.filter(seccomp) {
            // SAFETY: the call takes integers.
            unsafe { libc::kill(of as i32, libc::SIGSTOP) };
            return Some(child);
        }
        if !Path::new(&path).exists() {
            break;
        }
    }
    None
}

#[test]
fn whoever_reads_a_guest_s_file_system_can_do_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let image = boot_disk(folder.path(), 256 << 20);
    // It may be done before it is noticed.
    let found = (0..50).find_map(|_| {
        let mut child = run_from(&image).spawn().unwrap();
        let found = reader(child.id()).filter(|pid| {
            // Nobody reads the pipe, so that it comes to wait. It makes no other call that waits.
            let call = || fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            let waits = || call().starts_with(&format!("{} ", libc::SYS_write));
            let begun = Instant::now();
            while !waits() && !call().is_empty() && begun.elapsed() < Duration::from_secs(5) {}
            waits()
        });
        match found {
            Some(pid) => Some((child, pid)),
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                None
            }
        }
    });
    let (child, pid) = found.expect("a disk that is being read");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let has = |line: &str| assert!(status.contains(line), "{line}: {status}");
    has("NoNewPrivs:\t1");
    has("Threads:\t1");
    has("CapEff:\t0000000000000000");
    has("CapPrm:\t0000000000000000");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let bounded =
        |what| limits.lines().any(|line: &str| line.starts_with(what) && !line.contains("unlimited"));
    assert!(bounded("Max address space") && bounded("Max cpu time"), "{limits}");
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert_eq!(files, 2, "the disk and the pipe");
    // Whatever else it does ends it. Its own end is no end of the parent, which says what happened.
    let outcome = open(pid as i32, Path::new("/etc/hosts"), libc::O_RDONLY);
    assert_eq!(outcome, Outcome::Killed(libc::SIGSYS));
    // SAFETY: the call takes integers.
    unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("its reader was ended by signal 31"), "{said}");
}

#[test]
fn a_file_system_that_claims_impossible_sizes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = boot_disk(folder.path(), 4096);
    let run = || {
        let ended = run_from(&image).output().unwrap();
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    // It is read, though there is no kernel in it.
    let (code, said) = run();
    assert!(code == Some(1) && said.contains("neither an ELF file nor a bzImage"), "{code:?}: {said}");
    let change = ["-w", "-R", "set_inode_field /vmlinuz size 27000000000"];
    assert!(Command::new("debugfs").args(change).arg(&image).output().unwrap().status.success());
    let (code, said) = run();
    assert!(code == Some(1) && said.contains("a link of 27000000000 bytes"), "{code:?}: {said}");
    // The upper half of the number of blocks, though the file system does not count in 64 bits.
    let file = fs::File::options().read(true).write(true).open(&image).unwrap();
    let mut features = [0];
    file.read_exact_at(&mut features, 1024 + 96).unwrap();
    file.write_all_at(&[features[0] & !0x80], 1024 + 96).unwrap();
    file.write_all_at(&[0xfb, 0x17, 0, 0], 1024 + 0x150).unwrap();
    let (code, said) = run();
    assert!(code == Some(1) && said.contains("larger than the disk or partition"), "{code:?}: {said}");
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
