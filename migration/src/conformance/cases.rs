//! The cases. Each panics with what is wrong.

use super::Fixture;
use super::bed::{Bed, PATIENCE, REGION_PAGES, extent, ram, read, resident, scramble, write};
use crate::dirty::{DirtySet, runs};
use crate::memory::{Extent, PAGE_SIZE, Ram};
use crate::transport::{Lane, LaneStats, PlaneError, Secret, Session, Token};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for what is in flight between the two ends to land, if it could.
const IN_FLIGHT: Duration = Duration::from_millis(300);

/// A broken connection must be noticed within this time, whatever the session's own time-out is.
const SOON: Duration = Duration::from_secs(10);

/// Extents of many shapes: one page, neighbours, both ends of both regions, and one that is large.
fn shapes() -> Vec<Extent> {
    vec![
        extent(0, 0, 1),
        extent(0, 2, 1),
        extent(0, 3, 2),
        extent(0, 64, 64),
        extent(0, 1000, 3000),
        extent(0, REGION_PAGES[0] - 1, 1),
        extent(1, 0, 1),
        extent(1, 100, 33),
        extent(1, REGION_PAGES[1] - 2, 2),
    ]
}

/// What is sent arrives, and what is not sent stays as it was: absent.
pub fn content_arrives_and_nothing_else_changes(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let mut random = fastrand::Rng::with_seed(1);
    let shapes = shapes();
    let total: u64 = shapes.iter().map(|e| e.len).sum();
    shapes.iter().for_each(|e| scramble(&bed.source.ram, e, &mut random));
    // A page that exists at the source and is not sent.
    scramble(&bed.source.ram, &extent(0, 7000, 1), &mut random);
    bed.plane.lanes()[0].write(&shapes[..4]).unwrap();
    bed.plane.lanes()[1].write(&shapes[4..]).unwrap();
    bed.barrier(0);
    assert_eq!(bed.differences(), [(0, 7000)]);
    assert!(bed.destination.bytes_placed() > 0, "the destination shows no progress");
    assert!(resident(&bed.shadow) >= total);
}

/// An extent that leaves memory is refused before anything is sent, wherever in a list it stands.
pub fn extents_outside_memory_are_refused_and_harm_nothing(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 1);
    let inside = extent(0, 5, 1);
    let end = REGION_PAGES[0] * PAGE_SIZE;
    let outside = [
        Extent { region: 0, offset: end, len: PAGE_SIZE },
        Extent { region: 0, offset: end - PAGE_SIZE, len: 2 * PAGE_SIZE },
        Extent { region: 0, offset: 0, len: end + PAGE_SIZE },
        Extent { region: 0, offset: u64::MAX - PAGE_SIZE + 1, len: 2 * PAGE_SIZE },
        Extent { region: 0, offset: PAGE_SIZE, len: u64::MAX - PAGE_SIZE + 1 },
        Extent { region: 0, offset: 0, len: 0 },
        Extent { region: 2, offset: 0, len: PAGE_SIZE },
        Extent { region: u32::MAX, offset: 0, len: PAGE_SIZE },
    ];
    scramble(&bed.source.ram, &inside, &mut fastrand::Rng::with_seed(2));
    for bad in outside {
        for list in [vec![bad], vec![inside, bad], vec![bad, inside]] {
            let lane = &mut bed.plane.lanes()[0];
            assert!(matches!(lane.write(&list), Err(PlaneError::OutOfBounds(_))), "{bad:?} was written");
            assert!(matches!(lane.zero(&list), Err(PlaneError::OutOfBounds(_))), "{bad:?} was zeroed");
        }
    }
    bed.barrier(0);
    assert_eq!(bed.differences(), [(0, 5)], "a refused list was sent in part");
    bed.plane.lanes()[0].write(&[inside]).unwrap();
    bed.barrier(1);
    assert_eq!(bed.differences(), []);
}

/// Zeros are named: what was there is gone, and what was never there still is not.
pub fn zeros_are_named_and_make_nothing_exist(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let mut random = fastrand::Rng::with_seed(3);
    let used = [extent(0, 10, 20), extent(1, 50, 1)];
    used.iter().for_each(|e| scramble(&bed.source.ram, e, &mut random));
    bed.plane.lanes()[0].write(&used).unwrap();
    bed.barrier(0);
    let before = resident(&bed.shadow);
    // Half of the first extent, the second, and a large one that nobody ever touched.
    let zeros = [extent(0, 20, 10), extent(1, 50, 1), extent(0, 2000, 4000)];
    for zero in &zeros {
        write(&bed.source.ram, zero, &vec![0; zero.len as usize]);
    }
    bed.plane.lanes()[1].zero(&zeros).unwrap();
    bed.barrier(1);
    assert_eq!(bed.differences(), []);
    assert_eq!(resident(&bed.shadow), before, "naming zeros made memory exist, or took it away");
    // What was zeroed can be written again.
    scramble(&bed.source.ram, &extent(0, 25, 2), &mut random);
    bed.plane.lanes()[0].write(&[extent(0, 25, 2)]).unwrap();
    bed.barrier(2);
    assert_eq!(bed.differences(), []);
}

/// The guest keeps running. Whatever arrives meanwhile, a last write after it has stopped corrects it.
pub fn memory_may_change_while_it_travels(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 1);
    let all = extent(0, 0, 512);
    let stop = AtomicBool::new(false);
    let guest = Arc::clone(&bed.source.ram);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(4);
            while !stop.load(Ordering::Relaxed) {
                scramble(&guest, &extent(0, random.u64(..512), 1), &mut random);
            }
        });
        for round in 0..20 {
            bed.plane.lanes()[0].write(&[all]).unwrap();
            bed.barrier(round);
        }
        stop.store(true, Ordering::Relaxed);
    });
    bed.plane.lanes()[0].write(&[all]).unwrap();
    bed.barrier(20);
    assert_eq!(bed.differences(), []);
}

/// Writes to one page on one lane never overtake each other.
pub fn the_last_write_to_a_page_wins(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 1);
    let (page, around) = (extent(0, 77, 1), extent(0, 70, 100));
    for value in 0..500u32 {
        let content: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(PAGE_SIZE as usize).collect();
        write(&bed.source.ram, &page, &content);
        // Small and large writes take different ways through a transport.
        bed.plane.lanes()[0].write(&[if value % 3 == 0 { around } else { page }]).unwrap();
    }
    bed.barrier(0);
    assert_eq!(bed.differences(), []);
}

/// A confirmed barrier means that the bytes are in the destination's memory, at once, round after round,
/// and a barrier on one lane waits for no other.
pub fn a_barrier_means_placed(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 3);
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..200u32 {
        let lane = (round % 3) as usize;
        let pages = [1, 1, 3, 200][random.usize(..4)];
        let at = extent(0, random.u64(..REGION_PAGES[0] - pages), pages);
        scramble(&bed.source.ram, &at, &mut random);
        let lane = &mut bed.plane.lanes()[lane];
        lane.write(&[at]).unwrap();
        lane.post_barrier(round).unwrap();
        lane.wait_barrier(round).unwrap();
        assert!(read(&bed.shadow, &at) == read(&bed.source.ram, &at), "round {round}: confirmed too early");
    }
    assert_eq!(bed.differences(), []);
}

/// A migration in small: every round sends a random set of pages through all lanes at once, data and zeros,
/// and ends in a barrier.
pub fn rounds_of_random_extents_end_in_equal_memory(fixture: &dyn Fixture) {
    const LANES: u16 = 4;
    let mut bed = Bed::new(fixture, LANES);
    let mut random = fastrand::Rng::with_seed(6);
    let source = Arc::clone(&bed.source.ram);
    for round in 0..12 {
        let mut dirty = DirtySet::empty(&source);
        for _ in 0..[20, 300, 3000][random.usize(..3)] {
            let region = random.usize(..2);
            dirty.insert(region, random.u64(..REGION_PAGES[region]));
        }
        let mut data = vec![Vec::new(); usize::from(LANES)];
        let mut zeros = data.clone();
        for region in 0..REGION_PAGES.len() {
            for (first, pages) in runs(dirty.words(region), 0) {
                let run = extent(region as u32, first, pages);
                let lane = random.usize(..usize::from(LANES));
                if random.u8(..4) == 0 {
                    write(&source, &run, &vec![0; run.len as usize]);
                    zeros[lane].push(run);
                } else {
                    scramble(&source, &run, &mut random);
                    data[lane].push(run);
                }
            }
        }
        thread::scope(|scope| {
            for (lane, (data, zeros)) in bed.plane.lanes().iter_mut().zip(data.iter().zip(&zeros)) {
                scope.spawn(move || {
                    lane.write(data).unwrap();
                    lane.zero(zeros).unwrap();
                    lane.post_barrier(round).unwrap();
                    lane.wait_barrier(round).unwrap();
                });
            }
        });
        assert_eq!(bed.differences(), [], "round {round}");
    }
}

/// Everything of the shadow RAM, as it is now.
fn snapshot(shadow: &Ram) -> Vec<Vec<u8>> {
    (0..REGION_PAGES.len()).map(|r| read(shadow, &extent(r as u32, 0, REGION_PAGES[r]))).collect()
}

/// A source that goes on writing does not reach memory once the fence is up, and learns that it is cut off.
pub fn nothing_lands_after_the_fence(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let source = Arc::clone(&bed.source.ram);
    let writes = AtomicU64::new(0);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, lane) in bed.plane.lanes().iter_mut().enumerate() {
            let (source, writes) = (&source, &writes);
            threads.push(scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(number as u64);
                // Each lane has its own half, and every write changes all of what it sends.
                let mine = extent(0, number as u64 * 2048, 256);
                let began = Instant::now();
                loop {
                    scramble(source, &mine, &mut random);
                    let sent = lane.write(&[mine]).and_then(|()| lane.post_barrier(0));
                    if sent.and_then(|()| lane.wait_barrier(0)).is_err() {
                        return;
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                    assert!(began.elapsed() < PATIENCE, "a fenced lane still confirms");
                }
            }));
        }
        // The writers are at it: what is fenced off is a living stream.
        while writes.load(Ordering::Relaxed) < 50 {
            assert!(
                !threads.iter().any(thread::ScopedJoinHandle::is_finished),
                "a lane broke before the fence"
            );
            thread::yield_now();
        }
        bed.destination.fence().unwrap();
        let before = snapshot(&bed.shadow);
        assert!(resident(&bed.shadow) > 0);
        thread::sleep(IN_FLIGHT);
        assert!(snapshot(&bed.shadow) == before, "a write landed after the fence");
        bed.destination.fence().expect("fencing twice is fencing");
    });
    // A lane that was cut off stays so.
    for lane in bed.plane.lanes() {
        let late = lane.write(&[extent(1, 0, 4)]).and_then(|()| lane.post_barrier(1));
        assert!(late.and_then(|()| lane.wait_barrier(1)).is_err(), "a fenced lane works");
    }
    assert_eq!(read(&bed.shadow, &extent(1, 0, 4)), vec![0; 4 * PAGE_SIZE as usize]);
}

/// After the fence, even a caller who knows the token comes too late.
pub fn nobody_joins_after_the_fence(fixture: &dyn Fixture) {
    let mut bed = Bed::with_patience(fixture, 1, Duration::from_secs(2));
    bed.destination.fence().unwrap();
    try_to_write(fixture, &bed.source, &bed.offer);
    assert_eq!(resident(&bed.shadow), 0);
}

/// A source with another token gets no connection, or one that carries nothing.
pub fn a_wrong_token_is_refused(fixture: &dyn Fixture) {
    a_stranger_is_refused(fixture, |session| session.token.0[15] ^= 1);
}

/// Whoever has seen the token on the wire knows no secret, and that of another session is of no use.
pub fn a_wrong_secret_is_refused(fixture: &dyn Fixture) {
    a_stranger_is_refused(fixture, |session| session.secret.0[31] ^= 1);
    a_stranger_is_refused(fixture, |session| session.secret = Secret::NONE);
}

fn a_stranger_is_refused(fixture: &dyn Fixture, differs: impl Fn(&mut Session)) {
    let bed = Bed::with_patience(fixture, 1, Duration::from_secs(2));
    let mut stranger = bed.source.clone();
    differs(&mut stranger);
    try_to_write(fixture, &stranger, &bed.offer);
    assert_eq!(resident(&bed.shadow), 0, "a stranger's write landed");
    // The session itself is not disturbed.
    let mut bed = bed;
    scramble(&bed.source.ram, &extent(1, 3, 1), &mut fastrand::Rng::with_seed(8));
    bed.plane.lanes()[0].write(&[extent(1, 3, 1)]).unwrap();
    bed.barrier(0);
    assert_eq!(read(&bed.shadow, &extent(1, 3, 1)), read(&bed.source.ram, &extent(1, 3, 1)));
}

/// Connects and writes with a session that must not be let in; panics if any of it is confirmed.
fn try_to_write(fixture: &dyn Fixture, session: &Session, offer: &[u8]) {
    scramble(&session.ram, &extent(0, 9, 9), &mut fastrand::Rng::with_seed(7));
    if let Ok(mut plane) = fixture.source(1).connect(session, offer) {
        let lane = &mut plane.lanes()[0];
        let sent = lane.write(&[extent(0, 9, 9)]).and_then(|()| lane.post_barrier(0));
        assert!(sent.and_then(|()| lane.wait_barrier(0)).is_err(), "a stranger was served");
    }
    thread::sleep(IN_FLIGHT);
}

/// Two migrations at once do not touch each other's memory, and one that is fenced does not stop the other.
pub fn sessions_are_apart(fixture: &dyn Fixture) {
    let mut beds = [Bed::new(fixture, 2), Bed::new(fixture, 1)];
    let mut random = fastrand::Rng::with_seed(9);
    for bed in &mut beds {
        scramble(&bed.source.ram, &extent(0, 100, 50), &mut random);
        bed.plane.lanes()[0].write(&[extent(0, 100, 50)]).unwrap();
        bed.barrier(0);
    }
    assert!(beds.iter().all(|bed| bed.differences().is_empty()));
    beds[0].destination.fence().unwrap();
    let bed = &mut beds[1];
    scramble(&bed.source.ram, &extent(1, 0, 8), &mut random);
    bed.plane.lanes()[0].write(&[extent(1, 0, 8)]).unwrap();
    bed.barrier(1);
    assert_eq!(bed.differences(), []);
}

/// A lane waits for a missing confirmation no longer than the session's time-out.
pub fn silence_is_noticed(fixture: &dyn Fixture) {
    let patience = Duration::from_millis(400);
    let mut bed = Bed::with_patience(fixture, 1, patience);
    let began = Instant::now();
    // Nobody posted it, so nobody confirms it.
    let waited = bed.plane.lanes()[0].wait_barrier(7);
    assert!(matches!(waited, Err(PlaneError::Timeout(_))), "{waited:?}");
    assert!(began.elapsed() >= patience, "given up early");
    assert!(began.elapsed() < SOON, "given up late");
}

/// An interrupt ends the wait that is under way, and every later call.
pub fn an_interrupt_ends_every_wait(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let interrupter = bed.plane.interrupter();
    let began = Instant::now();
    thread::scope(|scope| {
        let (first, rest) = bed.plane.lanes().split_first_mut().unwrap();
        let blocked = scope.spawn(|| first.wait_barrier(3));
        thread::sleep(Duration::from_millis(100));
        assert!(!blocked.is_finished(), "the wait ended before it was interrupted");
        interrupter.interrupt();
        assert!(matches!(blocked.join().unwrap(), Err(PlaneError::Interrupted)));
        let lane = &mut rest[0];
        let later = lane.write(&[extent(0, 0, 1)]).and_then(|()| lane.post_barrier(0));
        assert!(later.and_then(|()| lane.wait_barrier(0)).is_err(), "an interrupted plane works");
    });
    assert!(began.elapsed() < SOON);
}

/// A destination that ends is noticed while data flows, and long before the session's patience is over.
pub fn a_destination_that_goes_away_is_noticed(fixture: &dyn Fixture) {
    let Bed { source, destination, mut plane, shadow, .. } = Bed::new(fixture, 1);
    scramble(&source.ram, &extent(0, 0, 256), &mut fastrand::Rng::with_seed(10));
    plane.lanes()[0].write(&[extent(0, 0, 256)]).unwrap();
    plane.lanes()[0].post_barrier(0).unwrap();
    plane.lanes()[0].wait_barrier(0).unwrap();
    drop(destination);
    let began = Instant::now();
    let lane = &mut plane.lanes()[0];
    while lane.write(&[extent(0, 0, 256)]).and_then(|()| lane.post_barrier(1)).is_ok() {
        assert!(began.elapsed() < SOON, "writes go nowhere and nobody says so");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(lane.wait_barrier(1).is_err());
    // The memory's owner may reuse it now: nothing of the dropped plane holds it or writes to it.
    let before = snapshot(&shadow);
    thread::sleep(IN_FLIGHT);
    assert!(snapshot(&shadow) == before);
}

/// A source that ends in the middle leaves a destination that can be fenced at once.
pub fn a_source_that_goes_away_leaves_the_destination_fenceable(fixture: &dyn Fixture) {
    let Bed { source, mut destination, mut plane, .. } = Bed::new(fixture, 2);
    scramble(&source.ram, &extent(0, 0, 512), &mut fastrand::Rng::with_seed(11));
    plane.lanes()[1].write(&[extent(0, 0, 512)]).unwrap();
    drop(plane);
    let began = Instant::now();
    destination.fence().unwrap();
    assert!(began.elapsed() < SOON);
}

/// Offers come from a peer: nonsense is an error, never a panic, a hang or an endless allocation.
pub fn nonsense_offers_are_refused(fixture: &dyn Fixture) {
    let token = Token([9; 16]);
    let patience = Duration::from_secs(2);
    let there = Session::new(token, ram(), patience);
    let (offer, destination) = fixture.destination().offer(&there).unwrap();
    let here = Session::new(Token([8; 16]), ram(), patience);
    let mut nonsense: Vec<Vec<u8>> = (0..offer.len()).map(|end| offer[..end].to_vec()).collect();
    nonsense.push(vec![0xff; 64]);
    nonsense.push(vec![0; 4096]);
    for bytes in nonsense {
        assert!(fixture.source(1).connect(&here, &bytes).is_err(), "{bytes:?} was taken for an offer");
    }
    drop(destination);
}

/// The report's figures are these.
pub fn lanes_count_what_they_carry(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let shapes = shapes();
    shapes.iter().for_each(|e| scramble(&bed.source.ram, e, &mut fastrand::Rng::with_seed(12)));
    bed.plane.lanes()[0].write(&shapes).unwrap();
    bed.plane.lanes()[0].zero(&[extent(0, 5000, 10)]).unwrap();
    bed.barrier(0);
    let stats = bed.plane.lanes()[0].stats();
    assert_eq!(stats.bytes, shapes.iter().map(|e| e.len).sum::<u64>());
    assert_eq!(stats.zero_bytes, 10 * PAGE_SIZE);
    assert!(stats.requests > 0);
    assert_eq!(bed.plane.lanes()[1].stats().bytes, 0);
}

/// A lane in a wrapper, such as one that counts bytes or caps a rate.
struct Wrapped {
    inner: Box<dyn Lane>,
    bytes: Arc<AtomicU64>,
}

impl Lane for Wrapped {
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.inner.write(extents)?;
        self.bytes.fetch_add(extents.iter().map(|extent| extent.len).sum(), Ordering::Relaxed);
        Ok(())
    }

    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.inner.zero(extents)
    }

    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.inner.post_barrier(round)
    }

    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.inner.wait_barrier(round)
    }

    fn stats(&self) -> LaneStats {
        self.inner.stats()
    }
}

/// Lanes may be taken out, wrapped and put back; they carry what they carried, and an interrupt still ends
/// their waits.
pub fn lanes_may_be_wrapped(fixture: &dyn Fixture) {
    let mut bed = Bed::new(fixture, 2);
    let bytes = Arc::new(AtomicU64::new(0));
    let wrap = |inner| Box::new(Wrapped { inner, bytes: Arc::clone(&bytes) }) as Box<dyn Lane>;
    let lanes = std::mem::take(bed.plane.lanes());
    *bed.plane.lanes() = lanes.into_iter().map(wrap).collect();
    let extents = [extent(0, 0, 100), extent(1, 0, 7)];
    extents.iter().for_each(|e| scramble(&bed.source.ram, e, &mut fastrand::Rng::with_seed(13)));
    bed.plane.lanes()[0].write(&extents[..1]).unwrap();
    bed.plane.lanes()[1].write(&extents[1..]).unwrap();
    bed.barrier(0);
    assert_eq!(bed.differences(), []);
    assert_eq!(bytes.load(Ordering::Relaxed), 107 * PAGE_SIZE);
    bed.plane.interrupter().interrupt();
    assert!(matches!(bed.plane.lanes()[1].wait_barrier(1), Err(PlaneError::Interrupted)));
    let began = Instant::now();
    drop(bed);
    assert!(began.elapsed() < SOON, "a plane with wrapped lanes is slow to end");
}
