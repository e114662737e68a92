//! `kill -9` of either side while Linux writes to ext4 on a disk that both sides may open. What the journal
//! leaves is clean, and what the guest knew to be durable is there: run by `ci/linux-kill`, in the lab.

use migration::monitor::Phase;
use migration::report::Verdict;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::command::{must, run_command};
use whimbrel_tests::kills::{LINE, Schedule, Side};
use whimbrel_tests::lab::mount_ext4;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::proxy::{Proxy, Way};
use whimbrel_tests::say;
use whimbrel_tests::sides::{PATIENCE, wait_until};

/// Each window once, then again with other delays.
const WINDOWS: [(Side, Phase); 6] = [
    (Side::Destination, Phase::Precopy),
    (Side::Source, Phase::Committed),
    (Side::Destination, Phase::Switchover),
    (Side::Source, Phase::Precopy),
    (Side::Destination, Phase::Committed),
    (Side::Source, Phase::Switchover),
];
const IMAGE: u64 = 48 << 20;
/// Files that the guest has to have written before it moves, and after.
const FILES: usize = 5;

/// Storage with direct I/O, which the lab's own file systems lack, and what is on it.
struct Scene {
    folder: tempfile::TempDir,
    /// How many machines have had a console so far.
    consoles: usize,
}

impl Scene {
    fn new() -> Self {
        let scene = Scene { folder: tempfile::tempdir().unwrap(), consoles: 0 };
        let (storage, mount) = (scene.path("storage"), scene.path("mount"));
        mount_ext4(storage.as_ref(), IMAGE * 3, mount.as_ref());
        std::fs::File::create(scene.image()).unwrap().set_len(IMAGE).unwrap();
        must(&format!("mkfs.ext4 -q {}", scene.image()));
        scene
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().unwrap()
    }

    fn image(&self) -> String {
        self.path("mount/disk")
    }

    fn next_console(&mut self) -> String {
        self.consoles += 1;
        self.path(&format!("console.{}", self.consoles))
    }

    /// Linux, at work on the disk.
    fn guest(&mut self) -> Node {
        let files = PathBuf::from(std::env::var_os("GUEST").expect("run by ci/linux-kill"));
        let console = self.next_console();
        let words: Vec<OsString> = vec![
            "run".into(),
            "--memory".into(),
            "128M".into(),
            "--kernel".into(),
            files.join("vmlinux").into(),
            "--initramfs".into(),
            files.join("initramfs").into(),
            "--on-reboot".into(),
            "exit".into(),
            "--cmdline".into(),
            "console=ttyS0 quiet panic=-1".into(),
            "--serial".into(),
            self.path("serial").into(),
            "--console".into(),
            console.clone().into(),
            "--disk".into(),
            self.image().into(),
        ];
        let name = format!("source-{}", self.consoles);
        let mut node = Node::start(whimbrel(), self.folder.path(), &name, words).unwrap();
        node.expect("running").unwrap();
        self.wait_files(&console);
        node
    }

    fn receiver(&mut self) -> (Node, SocketAddr, String) {
        let (console, disks) = (self.next_console(), self.path("mount"));
        let name = format!("destination-{}", self.consoles);
        let words = ["--console", &console, "--disks", &disks];
        let (node, address) = Node::receiver(whimbrel(), self.folder.path(), &name, words).unwrap();
        (node, address, console)
    }

    /// Waits until the guest goes on writing files where this console is.
    fn wait_files(&self, console: &str) {
        let before = kept(Path::new(console)).len();
        wait_until("the guest's files", || kept(Path::new(console)).len() >= before + FILES);
    }

    /// Looks at a copy of what the dead have left. How many files there are that had to be.
    fn check(&self) -> usize {
        let copy = self.path("copy");
        must(&format!("cp {} {copy}", self.image()));
        // What mounting would do: play the journal back. 1 says that something was done.
        let replay = run_command(Command::new("e2fsck").args(["-p", "-E", "journal_only", &copy]));
        assert!(matches!(replay.code, Some(0 | 1)), "{replay:?}");
        must(&format!("e2fsck -fn {copy}"));
        let mount = self.path("look");
        std::fs::create_dir_all(&mount).unwrap();
        must(&format!("mount -o loop,ro {copy} {mount}"));
        let mut expected = BTreeMap::new();
        for number in 1..=self.consoles {
            let console = self.path(&format!("console.{number}"));
            let said = std::fs::read_to_string(&console).unwrap_or_default();
            assert!(!said.contains("BAD"), "{said}");
            expected.extend(kept(Path::new(&console)));
        }
        for (name, sum) in &expected {
            let found = must(&format!("md5sum {mount}/{name}"));
            assert!(found.starts_with(sum.as_str()), "{name}: {found} instead of {sum}");
        }
        must(&format!("umount {mount}"));
        expected.len()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path("mount")).status();
    }
}

/// The files that a guest has said are durable, with their sums: whole lines only.
fn kept(console: &Path) -> BTreeMap<String, String> {
    let said = std::fs::read_to_string(console).unwrap_or_default();
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    let lines = whole.lines().filter_map(|line| line.trim().split_once(' '));
    let files = lines.filter(|(name, sum)| name.starts_with("kept") && sum.len() == 32);
    files.map(|(name, sum)| (name.to_string(), sum.to_string())).collect()
}

#[test]
#[ignore = "needs a Linux guest and the lab: ci/linux-kill"]
fn ext4_is_whole_whenever_a_side_is_killed() {
    let kills = std::env::var("KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(WINDOWS.len());
    let mut scene = Scene::new();
    for number in 0..kills {
        let (victim, aim) = WINDOWS[number % WINDOWS.len()];
        let delay = Duration::from_millis((number / WINDOWS.len()) as u64 * 3);
        let mut source = scene.guest();
        let here = scene.path(&format!("console.{}", scene.consoles));
        let (mut destination, address, there) = scene.receiver();
        let proxy = Proxy::start(address, LINE);
        let schedule = Schedule { victim, aim, delay };
        let phase = schedule.strike(&mut source, &mut destination, &proxy, |_| ());
        let outcome = match victim {
            Side::Source => {
                let event = destination.next_event().unwrap();
                if event["event"] == "arrived" {
                    scene.wait_files(&there);
                    destination.kill().unwrap();
                    "it went on at the destination"
                } else {
                    assert!(!proxy.delivered(Way::Up, "Commit"), "discarded after Commit: {event}");
                    "it died with its machine"
                }
            }
            Side::Destination => {
                let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
                match report.verdict {
                    Verdict::Stayed => {
                        scene.wait_files(&here);
                        "it went on at the source"
                    }
                    Verdict::Held => "it died with its machine, and is held at the source",
                    Verdict::Moved => "it had moved, and died with its machine",
                    other => panic!("{victim:?}: {other:?}"),
                }
            }
        };
        let _ = (source.kill(), destination.kill());
        let files = scene.check();
        say::figures(
            &format!("{victim:?} killed in {phase:?}").to_lowercase(),
            format_args!("{outcome}; ext4 is clean and has all {files} durable files"),
        );
    }
}
