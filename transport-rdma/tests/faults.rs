//! What breaks during a migration: devices, links, limits, libraries. Most of these tests take devices away
//! from the host, so they run only in the lab.

mod common;

use common::Devices;
use migration::conformance::Bed;
use migration::conformance::bed::{extent, read, scramble};
use migration::transport::{DestinationTransport, PlaneError, SourceTransport};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use whimbrel_transport_rdma::{RdmaDestination, RdmaSource, probe};

/// The session's patience, beyond which no call may go on for long.
const PATIENCE: Duration = Duration::from_secs(4);

/// What a call may take beyond that: emulated machines are slow.
const SLACK: Duration = Duration::from_secs(6);

/// Does `work` while no other test does any: one test at a time has the host's devices.
fn alone(work: impl FnOnce()) {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    work();
    drop(guard);
}

/// Runs a command of iproute2.
fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect(command);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Undoes a fault, however the test ends.
struct Repair(&'static [&'static str]);

impl Drop for Repair {
    fn drop(&mut self) {
        for command in self.0 {
            let words: Vec<&str> = command.split(' ').collect();
            let status = Command::new(words[0]).args(&words[1..]).status();
            assert!(status.is_ok_and(|s| s.success()) || thread::panicking(), "{command}");
        }
    }
}

/// Runs the rest of a test in a process of its own, in the lab, and then `$after` in this one.
///
/// librdmacm keeps devices open for as long as the process lives, the first one even if it is only asked
/// whether there are any; and soft-RoCE's driver does not delete a device that is open. So no process that
/// has used RDMA may be there when a device is to be gone.
macro_rules! apart_in_the_lab {
    ($test:literal, $after:expr) => {{
        if !changed() {
            alone(|| {
                again($test, &[], &[]);
                let () = $after;
                again("a_session_works", &[], &[]);
            });
            return;
        }
        Devices::of_this_host()
    }};
}

/// Writes until it fails, while `fault` happens; returns the error. Everything ends within the patience.
fn breaks(bed: &mut Bed, fault: impl FnOnce() + Send) -> PlaneError {
    let whole = extent(0, 0, 4096);
    scramble(&bed.source.ram, &whole, &mut fastrand::Rng::with_seed(1));
    let lane = &mut bed.plane.lanes()[0];
    lane.write(&[whole]).expect("a healthy lane");
    let error = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0.. {
                let sent = lane.write(&[whole]).and_then(|()| lane.post_barrier(round));
                if let Err(error) = sent.and_then(|()| lane.wait_barrier(round)) {
                    return (error, Instant::now());
                }
            }
            unreachable!("rounds do not end")
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!writer.is_finished(), "broken before the fault");
        let began = Instant::now();
        fault();
        let (error, ended) = writer.join().expect("no panic");
        let waited = ended.saturating_duration_since(began);
        assert!(waited < PATIENCE + SLACK, "noticed after {waited:?} only: {error}");
        println!("noticed after {waited:?}: {error}");
        error
    });
    let failed = matches!(error, PlaneError::Io { .. } | PlaneError::Timeout(_) | PlaneError::Protocol(_));
    assert!(failed, "{error:?} would not make the engine take another transport");
    error
}

/// The destination can be fenced, quickly, and its memory stays as it was then.
fn can_be_fenced(bed: Bed) {
    let Bed { mut destination, plane, shadow, .. } = bed;
    let began = Instant::now();
    destination.fence().expect("a fence in spite of the fault");
    assert!(began.elapsed() < SLACK, "the fence took {:?}", began.elapsed());
    let before = read(&shadow, &extent(0, 0, 4096));
    drop(plane);
    drop(destination);
    thread::sleep(Duration::from_millis(300));
    assert!(read(&shadow, &extent(0, 0, 4096)) == before, "memory changed after the fence");
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_session_works() {
    if !changed() {
        return alone(|| again("a_session_works", &[], &[]));
    }
    let devices = Devices::of_this_host();
    let mut bed = Bed::new(&devices, 1);
    scramble(&bed.source.ram, &extent(1, 0, 9), &mut fastrand::Rng::with_seed(2));
    bed.plane.lanes()[0].write(&[extent(1, 0, 9)]).expect("a new session");
    bed.barrier(0);
    assert_eq!(bed.differences(), []);
}

/// Begins to delete a device. With soft-RoCE that ends only when its last user has.
fn delete(device: &str) {
    let mut command = Command::new("rdma");
    // Whoever reads what this process writes shall not wait for that one.
    command.args(["link", "delete", device]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("rdma, of iproute2");
    // It may well outlive this process.
    thread::spawn(move || child.wait());
}

/// Makes a device anew, once its deletion has ended, and waits until it is ready.
fn add(device: &str, interface: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let words = ["link", "add", device, "type", "rxe", "netdev", interface];
    while !Command::new("rdma").args(words).status().is_ok_and(|status| status.success()) {
        assert!(Instant::now() < deadline, "{device} is still held");
        thread::sleep(Duration::from_millis(50));
    }
    let ready = |port: &probe::Port| port.active && port.gids.iter().any(|gid| gid.address.is_ipv4());
    while probe::devices().iter().flatten().flat_map(|d| &d.ports).filter(|port| ready(port)).count() < 2 {
        assert!(Instant::now() < deadline, "{device} does not get ready");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_destinations_device_is_removed() {
    let devices = apart_in_the_lab!("the_destinations_device_is_removed", add("rxe1", "lab1"));
    let mut bed = Bed::with_patience(&devices, 2, PATIENCE);
    breaks(&mut bed, || delete("rxe1"));
    can_be_fenced(bed);
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_sources_device_is_removed() {
    let devices = apart_in_the_lab!("the_sources_device_is_removed", add("rxe0", "lab0"));
    let mut bed = Bed::with_patience(&devices, 2, PATIENCE);
    breaks(&mut bed, || delete("rxe0"));
    can_be_fenced(bed);
}

/// The cable loses everything, and both ports stay active: the least that there is to notice.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_link_is_cut() {
    let devices = apart_in_the_lab!("the_link_is_cut", ());
    let mut bed = Bed::with_patience(&devices, 2, PATIENCE);
    let repair = Repair(&["tc qdisc del dev lab0 root"]);
    breaks(&mut bed, || run("tc qdisc add dev lab0 root netem loss 100%"));
    can_be_fenced(bed);
    drop(repair);
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_port_goes_down() {
    // Linux 6.1's soft-RoCE does not always receive again after its interface was down under load; a new
    // device does.
    let devices = apart_in_the_lab!("the_port_goes_down", {
        delete("rxe1");
        thread::sleep(Duration::from_millis(500));
        add("rxe1", "lab1");
    });
    let mut bed = Bed::with_patience(&devices, 2, PATIENCE);
    let repair = Repair(&[
        "ip link set lab1 up",
        // The lab's route back, which went with the link.
        "ip route add 10.77.0.1 dev lab1 src 10.77.0.2 table 772",
    ]);
    breaks(&mut bed, || run("ip link set lab1 down"));
    can_be_fenced(bed);
    drop(repair);
}

/// Loss is not failure: queue pairs repeat what is lost.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_lossy_link_loses_nothing() {
    let devices = apart_in_the_lab!("a_lossy_link_loses_nothing", ());
    let mut bed = Bed::new(&devices, 2);
    let repair = Repair(&["tc qdisc del dev lab0 root"]);
    run("tc qdisc add dev lab0 root netem loss 0.2%");
    let whole = extent(0, 0, 2048);
    scramble(&bed.source.ram, &whole, &mut fastrand::Rng::with_seed(3));
    bed.plane.lanes()[0].write(&[extent(0, 0, 1024)]).unwrap();
    bed.plane.lanes()[1].write(&[extent(0, 1024, 1024)]).unwrap();
    bed.barrier(0);
    drop(repair);
    assert_eq!(bed.differences(), []);
}

/// Runs one test of this program again, in another environment; `changed` is set there.
fn again(test: &str, prefix: &[&str], variables: &[(&str, &str)]) {
    let this = std::env::current_exe().expect("this program");
    let this = this.to_str().expect("a path in UTF-8");
    let words: Vec<&str> =
        prefix.iter().copied().chain([this, "--include-ignored", "--exact", test, "--nocapture"]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("CHANGED", "1").envs(variables.iter().copied());
    let output = command.output().expect("the test again");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    assert!(output.status.success() && text.contains("1 passed"), "{test} failed in a process of its own");
}

fn changed() -> bool {
    std::env::var_os("CHANGED").is_some()
}

/// Both sides say why they cannot, and neither panics.
fn unavailable(to: std::net::IpAddr) -> [String; 2] {
    let token = migration::transport::Token([1; 16]);
    let session = migration::transport::Session::new(token, migration::conformance::bed::ram(), PATIENCE);
    let Err(PlaneError::Unavailable(there)) = RdmaDestination::new(to, Default::default()).offer(&session)
    else {
        panic!("an offer was made");
    };
    // What a destination elsewhere might have offered.
    let mut offer = b"WRDM\x02\x00\x39\x30\0\0\0\0\0\0\0\0\0\0\xff\xff".to_vec();
    let std::net::IpAddr::V4(v4) = to else { panic!("not an IPv4 address") };
    offer.extend(v4.octets());
    offer.extend([2, 24, 24]);
    let Err(PlaneError::Unavailable(here)) = RdmaSource::new(Default::default()).connect(&session, &offer)
    else {
        panic!("a connection was made");
    };
    println!("{there}\n{here}");
    [there, here]
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn too_little_lockable_memory_is_said_before_anything_moves() {
    const TEST: &str = "too_little_lockable_memory_is_said_before_anything_moves";
    if changed() {
        let devices = Devices::of_this_host();
        for text in unavailable(devices.to) {
            assert!(text.contains("8192 KiB") && text.contains("ulimit -l"), "{text}");
        }
        return;
    }
    let without =
        ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=8388608"];
    alone(|| again(TEST, &without, &[]));
}

/// Whatever the loader finds in the place of a library, the program starts, and says what to install.
#[test]
fn without_the_libraries_programs_start_and_say_what_to_install() {
    const TEST: &str = "without_the_libraries_programs_start_and_say_what_to_install";
    if changed() {
        for text in unavailable([127, 0, 0, 1].into()) {
            assert!(text.contains("librdmacm.so.1") && text.contains("install"), "{text}");
        }
        return;
    }
    let directory = std::env::temp_dir().join(format!("no-rdma-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a directory");
    std::fs::write(directory.join("librdmacm.so.1"), "no library").expect("a file");
    let path = directory.to_str().expect("a path in UTF-8").to_string();
    let result = std::panic::catch_unwind(|| again(TEST, &[], &[("LD_LIBRARY_PATH", &path)]));
    std::fs::remove_dir_all(&directory).expect("to be removed");
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Both sides say that an address is not a device's; or, where this host has no RDMA at all, that.
#[test]
fn an_address_without_a_device_is_said() {
    const TEST: &str = "an_address_without_a_device_is_said";
    if !changed() {
        return alone(|| again(TEST, &[], &[]));
    }
    let texts = unavailable([127, 0, 0, 1].into());
    match probe::host().connections {
        Ok(()) => no_device_has_the_loopback_address(&texts),
        Err(why) => assert_eq!(texts, [why.clone(), why]),
    }
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn an_address_beside_the_devices_is_said() {
    const TEST: &str = "an_address_beside_the_devices_is_said";
    if !changed() {
        return alone(|| again(TEST, &[], &[]));
    }
    probe::host().connections.expect("connections over RDMA");
    no_device_has_the_loopback_address(&unavailable([127, 0, 0, 1].into()));
}

fn no_device_has_the_loopback_address([there, here]: &[String; 2]) {
    assert!(there.starts_with("127.0.0.1 is on no RDMA device"), "{there}");
    assert!(here.starts_with("127.0.0.1 cannot be reached over RDMA"), "{here}");
}
