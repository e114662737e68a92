//! Requests to the API: as bytes on its socket, and as the JSON of a migration.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tempfile::TempDir;
use whimbrel::api::model::MigrationRequest;
use whimbrel::api::server::{self, Server};
use whimbrel::slot::Slot;

struct Served {
    folder: TempDir,
    _server: Server,
}

fuzz_target!(init: whimbrel_fuzz::ignore_broken_pipes(), |bytes: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<MigrationRequest>(bytes) {
        let _ = request.policy();
        let again = serde_json::to_vec(&request).expect("JSON");
        assert_eq!(serde_json::from_slice::<MigrationRequest>(&again).expect("a request"), request);
    }
    static SERVED: OnceLock<Served> = OnceLock::new();
    let served = SERVED.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let server = server::serve(&folder.path().join("api"), Arc::new(Slot::default())).expect("a server");
        Served { folder, _server: server }
    });
    let mut stream = UnixStream::connect(served.folder.path().join("api")).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    // The server may hang up before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer and no end");
    }
});
