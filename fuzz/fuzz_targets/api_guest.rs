//! Requests to the API of a guest that runs here: it is paused, moved to where nobody is, and ended, over and
//! over. There is no network, so that requests reach nobody else.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use vmm::guest::Workload;
use vmm::{Host, Machine, MachineConfig, SerialOutput};
use whimbrel::api::server::{self, Server};
use whimbrel::instance::Instance;
use whimbrel::security::Security;
use whimbrel::slot::Slot;

struct Served {
    /// Before the folder that its socket is in.
    _server: Server,
    folder: TempDir,
    instance: Arc<Instance>,
}

/// A guest that does nothing, and its API.
fn serve() -> Served {
    let host = Host::open().expect("KVM");
    let config = MachineConfig::new(&host, 32 << 20, 1).expect("a machine");
    let machine =
        Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config }).expect("a machine");
    Workload::idle(1).boot(&machine).expect("a guest");
    machine.resume().expect("a guest that runs");
    let instance = Instance::new("fuzzed".into(), Arc::new(machine), Security::Near, |_| {});
    let slot = Arc::new(Slot::default());
    slot.put(Arc::clone(&instance));
    let folder = tempfile::tempdir().expect("a folder");
    let server = server::serve(&folder.path().join("api"), slot).expect("a server");
    Served { _server: server, folder, instance }
}

/// Leaves the network. Who may not needs a namespace of users for it.
fn begin() {
    whimbrel_fuzz::ignore_broken_pipes();
    // SAFETY: no pointers are involved, and this process has one thread yet.
    let alone = |what| unsafe { libc::unshare(what) } == 0;
    assert!(
        alone(libc::CLONE_NEWNET) || alone(libc::CLONE_NEWUSER | libc::CLONE_NEWNET),
        "cannot leave the network, to which requests would go: {}",
        io::Error::last_os_error()
    );
}

fuzz_target!(init: begin(), |bytes: &[u8]| {
    static SERVED: Mutex<Option<Served>> = Mutex::new(None);
    let mut place = SERVED.lock().expect("no panic before");
    // The next input finds a guest, even if this one has been ended.
    if place.as_ref().is_some_and(|served| served.instance.machine().outcome().is_some()) {
        *place = None;
    }
    let served = place.get_or_insert_with(serve);
    let mut stream = UnixStream::connect(served.folder.path().join("api")).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    // The server may hang up before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "no answer and no end");
    }
});
