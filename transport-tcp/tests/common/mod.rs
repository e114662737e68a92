//! Something to move, and both sides of a move.

use self::cache::{Cache, CacheHost};
use migration::link::ControlLink;
use migration::machine::SourceMachine;
use migration::report::Verdict;
use migration::transport::{DestinationTransport, SourceTransport};
use migration::{Failure, destination, source};

#[allow(dead_code)] // its own `main`, for one
#[path = "../../examples/cache.rs"]
mod cache;

/// A cache of so many MiB that is renewed all the time.
pub fn cache(mib: u64) -> Cache {
    Cache::filled(mib << 20).unwrap()
}

/// Moves a cache away through as many lanes as are expected.
pub fn send(
    cache: &Cache,
    link: &mut dyn ControlLink,
    transport: impl SourceTransport + 'static,
    lanes: usize,
) {
    let report = source::Migration::new(cache, link).transport(transport).run();
    assert_eq!((report.verdict, report.failure), (Verdict::Moved, None));
    assert_eq!(report.lanes.len(), lanes);
}

/// Takes a cache in.
pub fn receive(
    link: &mut dyn ControlLink,
    transport: impl DestinationTransport + 'static,
) -> Result<Cache, Failure> {
    Ok(destination::Migration::new(&mut CacheHost, link).transport(transport).run()?.conclude())
}

/// Checks that `twin`, which goes on, has all that the cache had when it was moved.
pub fn assert_moved(cache: &Cache, twin: &Cache) {
    twin.pause().unwrap();
    assert_eq!(SourceMachine::ram(cache).layout(), SourceMachine::ram(twin).layout());
    let (left, now) = (cache.check().unwrap(), twin.check().unwrap());
    assert!(left <= now, "the twin has {now} of {left} renewals");
}
