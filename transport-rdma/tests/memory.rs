//! What is registered, and how lanes wait.

mod common;

use common::Devices;
use migration::conformance::Bed;
use migration::conformance::bed::{extent, resident, scramble};
use whimbrel_transport_rdma::{DEFAULT_CHUNK, MIN_CHUNK, Options, Waiting};

/// Pinning makes memory exist, so only chunks that are written to are pinned: on both sides.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn untouched_chunks_stay_untouched() {
    let devices = Devices::of_this_host();
    let mut bed = Bed::new(&devices, 2);
    assert!(bed.source.ram.len() > 2 * DEFAULT_CHUNK);
    scramble(&bed.source.ram, &extent(0, 7, 1), &mut fastrand::Rng::with_seed(1));
    bed.plane.lanes()[0].write(&[extent(0, 7, 1)]).unwrap();
    bed.barrier(0);
    assert_eq!(bed.differences(), []);
    for ram in [&bed.source.ram, &bed.shadow] {
        assert!((4096..=DEFAULT_CHUNK).contains(&resident(ram)), "{} bytes exist", resident(ram));
    }
}

/// Chunks of any size, lanes that do not sleep, and sides that chose differently.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn every_choice_carries_a_round() {
    let devices = Devices::of_this_host();
    for (waiting, chunk) in [(Waiting::BusyPoll, MIN_CHUNK), (Waiting::Sleep, 1), (Waiting::Sleep, 1 << 30)] {
        let options = Options::default().with_waiting(waiting).with_chunk(chunk);
        let mut bed = Bed::new(&Devices { options, ..devices }, 2);
        let mut random = fastrand::Rng::with_seed(chunk);
        // Across every boundary of a small chunk, and the end of the region.
        let all = [extent(0, 500, 1000), extent(0, 8000, 195), extent(1, 0, 513)];
        all.iter().for_each(|extent| scramble(&bed.source.ram, extent, &mut random));
        bed.plane.lanes()[0].write(&all[..1]).unwrap();
        bed.plane.lanes()[1].write(&all[1..]).unwrap();
        bed.barrier(0);
        assert_eq!(bed.differences(), [], "{waiting:?}, chunks of {chunk}");
        let stats = bed.plane.lanes()[0].stats();
        assert!(stats.registration_us > 0 && stats.registration_overlap_us <= stats.registration_us);
    }
}
