// What the embedded guest and the VMM agree on. Compiled into both, so only plain items here.

/// Guest-physical address of [`Header`]; the page of vCPU `n` is `n + 1` pages further on.
pub const REPORT_ADDRESS: u64 = 0x10_0000;

/// First field of the header.
pub const MAGIC: u64 = u64::from_le_bytes(*b"WHIMBREL");

/// Version of everything in this file. A VMM reads reports of its own version only.
pub const VERSION: u32 = 5;

/// Most vCPUs that the guest can use; their APIC IDs are 0, 1, 2 and so on.
pub const MAX_VCPUS: usize = 64;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Where the working set may begin: what lies below is the guest's image, tables and report.
pub const WORKING_SET_START: u64 = 8 << 20;

/// Buckets of a gap histogram: four to each power of two of TSC ticks, from [`SHORTEST_GAP`] up.
pub const GAP_BUCKETS: usize = 128;

/// Binary logarithm of the gap at which the first bucket begins; it holds shorter ones too.
pub const SHORTEST_GAP: u32 = 8;

/// Entries of the timeline.
pub const TIMELINE: usize = 128;

/// Milliseconds of an interval of the timeline.
pub const INTERVAL_MS: u64 = 10;

/// Long gaps that are remembered.
pub const RECENT_GAPS: usize = 24;

/// Milliseconds from which a gap is long, beyond the period of the guest's timer.
pub const LONG_GAP_MS: u64 = 2;

/// Bad pages that are described; more are only counted.
pub const BAD_PAGES: usize = 4;

/// The guest has not come far yet.
pub const STATE_BOOTING: u32 = 0;
/// It writes its working set for the first time.
pub const STATE_FILLING: u32 = 1;
/// It does what it was told to do.
pub const STATE_RUNNING: u32 = 2;
/// It met an exception or could not do what it was told; `detail` says what.
pub const STATE_FAILED: u32 = 3;
/// It was told to finish: each page has been verified once more, and none is written any longer.
pub const STATE_FINISHED: u32 = 4;

/// In `detail[0]` of a failed guest: a vCPU, by its number in `detail[1]`, did not start.
pub const FAILED_START: u64 = 0x100;
/// In `detail[0]` of a failed guest: it found an error in itself. Lower numbers are exceptions, and
/// `detail[1]` is then the address of the instruction.
pub const FAILED_PANIC: u64 = 0x101;

/// In `detail[0]` of a failed guest: it was to keep a journal and found no disk.
pub const FAILED_DISK: u64 = 0x102;

/// Nothing is asked of the guest.
pub const COMMAND_NONE: u32 = 0;
/// Complete the pass, verify the whole working set once, and be idle.
pub const COMMAND_FINISH: u32 = 1;
/// The same, and then power off.
pub const COMMAND_POWER_OFF: u32 = 2;

/// A word with this bit set, written to this port, powers the machine off.
pub const POWER_PORT: u16 = 0x604;
/// See [`POWER_PORT`].
pub const POWER_OFF: u16 = 1 << 13;

/// Gaps are charged to these phases; the VMM says which one it is.
pub const PHASES: usize = 3;
/// Before the switchover.
pub const PHASE_BEFORE: u32 = 0;
/// From just before the pause until some time after the guest runs again.
pub const PHASE_DURING: u32 = 1;
/// After that.
pub const PHASE_AFTER: u32 = 2;

/// The whole guest.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header {
    /// [`MAGIC`], once the guest has begun.
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// One of the states.
    pub state: u32,
    /// Written by the VMM: one of the phases.
    pub phase: u32,
    /// Written by the VMM: one of the commands.
    pub command: u32,
    /// vCPUs in use.
    pub vcpus: u32,
    /// TSC frequency in kHz as the guest knows it; 0 if nothing told it.
    pub tsc_khz: u32,
    /// Bytes of the working set.
    pub working_set: u64,
    /// After a failure: which one, and where.
    pub detail: [u64; 2],
    /// vCPUs that have finished.
    pub finished: u64,
    /// Entries of the journal that the disk has confirmed.
    pub journal: u64,
    /// Blocks of it that did not hold what was written there last.
    pub journal_bad: u64,
    /// The first of them.
    pub journal_first: BadPage,
    /// Requests that the disk refused.
    pub journal_failed: u64,
}

/// A page that did not hold what it should.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BadPage {
    /// Its number in the working set.
    pub page: u64,
    /// The generation that it should have.
    pub expected: u64,
    /// Index of the first stamped word that is wrong.
    pub word: u64,
    /// That word.
    pub found: u64,
}

/// A gap that was longer than usual.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LongGap {
    /// The TSC when it ended.
    pub end: u64,
    /// TSC ticks.
    pub length: u64,
}

/// One vCPU. Only it writes here.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Cpu {
    /// How often it looked at the clock.
    pub samples: u64,
    /// Pages checked and rewritten.
    pub pages: u64,
    /// Times that its whole share was rewritten.
    pub passes: u64,
    /// Pages verified after it was told to finish.
    pub verified: u64,
    /// Pages whose content is not of this page or of no generation.
    pub lost: u64,
    /// Pages that hold another generation, and that one throughout.
    pub stale: u64,
    /// Pages of which parts are of different generations.
    pub torn: u64,
    /// Times that the TSC or kvmclock went backwards on this vCPU.
    pub backwards: u64,
    /// Times that the TSC was behind what another vCPU had read before.
    pub behind: u64,
    /// Timer interrupts of the local APIC.
    pub ticks: u64,
    /// Timer interrupts of the PIT (first vCPU only).
    pub pit_ticks: u64,
    /// Longest time, in TSC ticks, that this vCPU ran without an interrupt of the local APIC's timer, and
    /// without one of the PIT (first vCPU only).
    pub silence: [u64; 2],
    /// Last look at the clock.
    pub last_tsc: u64,
    /// Longest time between two looks at the clock, in TSC ticks, for each phase.
    pub longest_gap: [u64; PHASES],
    /// Long gaps so far; number `n` is, or was, at `n % RECENT_GAPS` of the next field.
    pub long_gaps: u64,
    /// The last of them.
    pub recent: [LongGap; RECENT_GAPS],
    /// The first bad pages.
    pub bad: [BadPage; BAD_PAGES],
    /// How many gaps were of which length, for each phase.
    pub gaps: [[u32; GAP_BUCKETS]; PHASES],
    /// Pages rewritten (without a working set: looks at the clock) in each interval of guest time, as
    /// a ring: number of the interval and count. Intervals without any have no entry.
    pub timeline: [[u32; 2]; TIMELINE],
}

const _: () = assert!(size_of::<Cpu>() as u64 <= PAGE);

/// The bucket of a gap of `ticks`.
pub fn gap_bucket(ticks: u64) -> usize {
    let longest = (1u64 << (SHORTEST_GAP as usize + GAP_BUCKETS / 4)) - 1;
    let ticks = ticks.clamp(1 << SHORTEST_GAP, longest);
    let top = ticks.ilog2();
    (top - SHORTEST_GAP) as usize * 4 + ((ticks >> (top - 2)) & 3) as usize
}

// A stamped word is a sum of multiples of odd constants: one of the page's number, one of the
// generation, one of the word's index. Stepping from page to page, word to word and generation to
// generation is then one addition each, which matters where a guest runs at a few million instructions a
// second. And since an odd factor has an inverse modulo 2^64, the generation can be computed from a word
// that is found. Generations are small numbers: a word that yields one was almost surely written
// for this page at this index, so that the high half serves as a checksum.

/// The part that every stamp has: zeroes are no stamp.
const SEED: u64 = 0x243f_6a88_85a3_08d3;
/// Factor of the page's number.
pub const PER_PAGE: u64 = 0x9e37_79b9_7f4a_7c15;
/// Factor of the generation.
pub const PER_GENERATION: u64 = 0xff51_afd7_ed55_8ccd;
/// Factor of the word's index.
pub const PER_WORD: u64 = 0xc4ce_b9fe_1a85_ec53;

/// Word `index` of the stamp of `page` in `generation`.
pub const fn stamp(page: u64, generation: u64, index: u64) -> u64 {
    SEED.wrapping_add(page.wrapping_mul(PER_PAGE))
        .wrapping_add(generation.wrapping_mul(PER_GENERATION))
        .wrapping_add(index.wrapping_mul(PER_WORD))
}

/// The generation of which `found` is word `index` of `page`; a number beyond all generations if it is
/// of none.
pub const fn generation_of(found: u64, page: u64, index: u64) -> u64 {
    found.wrapping_sub(stamp(page, 0, index)).wrapping_mul(inverse(PER_GENERATION))
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration. The first three bits are right from the
/// start, and each step doubles their number.
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut right = 3;
    while right < 64 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)));
        right *= 2;
    }
    inverse
}
