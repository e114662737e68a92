//! Times between two looks at the clock, as the guest recorded them.

use super::abi::{Cpu, GAP_BUCKETS, PHASES, RECENT_GAPS, SHORTEST_GAP, TIMELINE};
use serde::{Deserialize, Serialize};

/// Long gaps that are reported.
const LONGEST: usize = 8;

/// A distribution of gaps, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Gaps {
    /// How many there were.
    pub count: u64,
    /// Half of all gaps are at most this.
    pub median_us: f64,
    /// 99 in 100.
    pub p99_us: f64,
    /// 999 in 1000.
    pub p999_us: f64,
}

/// One long gap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LongGap {
    /// The vCPU that felt it.
    pub vcpu: u32,
    /// How long ago it ended, seen from the guest's last look at the clock, in microseconds.
    pub ago_us: f64,
    /// Its length in microseconds.
    pub length_us: f64,
}

/// The gaps of these phases over all vCPUs. Percentiles are the upper ends of the histogram's buckets: too
/// high by a quarter at most.
pub(super) fn distribution(cpus: &[Cpu], phases: &[usize], us: impl Fn(u64) -> f64) -> Gaps {
    let mut counts = [0u64; GAP_BUCKETS];
    for histogram in cpus.iter().flat_map(|cpu| phases.iter().filter_map(|phase| cpu.gaps.get(*phase))) {
        counts.iter_mut().zip(histogram).for_each(|(sum, n)| *sum += u64::from(*n));
    }
    let count: u64 = counts.iter().sum();
    let percentile = |share: f64| {
        let wanted = (count as f64 * share).ceil() as u64;
        let mut seen = 0;
        let bucket = counts.iter().position(|n| {
            seen += n;
            seen >= wanted && seen > 0
        });
        bucket.map_or(0.0, |bucket| us(bucket_end(bucket)))
    };
    Gaps { count, median_us: percentile(0.5), p99_us: percentile(0.99), p999_us: percentile(0.999) }
}

/// The longest gap of a bucket, in ticks: the inverse of `abi::gap_bucket`.
fn bucket_end(bucket: usize) -> u64 {
    let (top, quarter) = (SHORTEST_GAP as usize + bucket / 4, bucket as u64 % 4);
    ((5 + quarter) << (top - 2)) - 1
}

/// Longest gap of each phase on any vCPU, in ticks.
pub(super) fn longest(cpus: &[Cpu]) -> [u64; PHASES] {
    std::array::from_fn(|phase| cpus.iter().map(|cpu| cpu.longest_gap[phase]).max().unwrap_or(0))
}

/// The longest of the gaps that are still remembered, longest first.
pub(super) fn long_gaps(cpus: &[Cpu], us: impl Fn(u64) -> f64) -> Vec<LongGap> {
    let now = cpus.iter().map(|cpu| cpu.last_tsc).max().unwrap_or(0);
    let mut all: Vec<_> = cpus
        .iter()
        .zip(0u32..)
        .flat_map(|(cpu, vcpu)| {
            let known = cpu.long_gaps.min(RECENT_GAPS as u64) as usize;
            cpu.recent[..known].iter().map(move |gap| (vcpu, *gap))
        })
        .collect();
    all.sort_by_key(|(_, gap)| std::cmp::Reverse(gap.length));
    all.truncate(LONGEST);
    all.into_iter()
        .map(|(vcpu, gap)| LongGap {
            vcpu,
            ago_us: us(now.saturating_sub(gap.end)),
            length_us: us(gap.length),
        })
        .collect()
}

/// What all vCPUs together did in each of the last intervals of guest time, oldest first.
pub(super) fn timeline(cpus: &[Cpu]) -> Vec<u64> {
    let entries = || cpus.iter().flat_map(|cpu| cpu.timeline).filter(|[number, _]| *number != 0);
    let Some(newest) = entries().map(|[number, _]| number).max() else { return Vec::new() };
    let mut intervals = vec![0u64; TIMELINE];
    for [number, count] in entries() {
        if let Some(place) = (TIMELINE - 1).checked_sub((newest - number) as usize) {
            intervals[place] += u64::from(count);
        }
    }
    let first = intervals.iter().position(|n| *n != 0).unwrap_or(0);
    intervals.split_off(first)
}

#[cfg(test)]
mod tests {
    use super::super::abi::{LongGap as Recorded, gap_bucket};
    use super::super::testimony::tests::empty;
    use super::*;

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        for ticks in [256u64, 300, 4095, 4096, 1 << 30, (1 << 39) + 1] {
            let bucket = gap_bucket(ticks);
            assert!(ticks <= bucket_end(bucket), "{ticks}");
            assert_eq!(gap_bucket(bucket_end(bucket)), bucket, "{ticks}");
            assert_eq!(gap_bucket(bucket_end(bucket) + 1), bucket + 1, "{ticks}");
        }
        assert_eq!(gap_bucket(0), 0);
        assert_eq!(gap_bucket(u64::MAX), GAP_BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_phases_asked_for() {
        let mut cpu = empty();
        cpu.gaps[0][gap_bucket(1000)] = 98;
        cpu.gaps[2][gap_bucket(50_000)] = 2;
        cpu.gaps[1][gap_bucket(9_000_000)] = 1000;
        let gaps = distribution(&[cpu], &[0, 2], |ticks| ticks as f64);
        assert_eq!(gaps.count, 100);
        assert!((1000.0..1280.0).contains(&gaps.median_us), "{gaps:?}");
        assert!((50_000.0..64_000.0).contains(&gaps.p99_us), "{gaps:?}");
        assert_eq!(distribution(&[], &[0], |ticks| ticks as f64), Gaps::default());
    }

    #[test]
    fn intervals_line_up_across_vcpus_and_old_ones_drop_out() {
        let (mut one, mut two) = (empty(), empty());
        one.timeline[..3].copy_from_slice(&[[1000, 5], [1001, 6], [1003, 7]]);
        two.timeline[..3].copy_from_slice(&[[1001, 10], [1003, 20], [7, 99]]);
        assert_eq!(timeline(&[one, two]), [5, 16, 0, 27]);
        assert!(timeline(&[empty()]).is_empty());
    }

    #[test]
    fn the_longest_gaps_come_first() {
        let mut cpu = empty();
        cpu.last_tsc = 1000;
        cpu.long_gaps = 2;
        cpu.recent[0] = Recorded { end: 400, length: 10 };
        cpu.recent[1] = Recorded { end: 900, length: 30 };
        cpu.recent[2] = Recorded { end: 1, length: 999 };
        let gaps = long_gaps(&[empty(), cpu], |ticks| ticks as f64);
        assert_eq!(gaps[0], LongGap { vcpu: 1, ago_us: 100.0, length_us: 30.0 });
        assert_eq!(gaps.len(), 2, "what was never written is no gap");
    }
}
