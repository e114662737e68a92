//! Distributions of a few dozen figures: kept whole, so that nothing is lost to buckets.

use serde::Serialize;

/// A sample's distribution.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// How many figures there are.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// A quarter of the figures are at most this.
    pub p25: f64,
    /// The one in the middle; of an even number, the mean of the two.
    pub median: f64,
    /// Three quarters are at most this.
    pub p75: f64,
    /// Nine in ten.
    pub p90: f64,
    /// The largest.
    pub max: f64,
}

impl Distribution {
    /// The distribution of `figures`; `None` if there are none.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        let p = |share| nearest_rank(&sorted, share);
        Some(Distribution { count: sorted.len(), min, p25: p(0.25), median, p75: p(0.75), p90: p(0.9), max })
    }
}

/// The smallest figure that at least this share of all figures does not exceed: always one that was measured.
fn nearest_rank(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The ratios of figures measured in the same round; rounds in which either is missing are left out.
pub fn pairwise(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<Distribution> {
    let pairs = ours.iter().zip(theirs).filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?));
    Distribution::of(pairs.filter(|ratio| ratio.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let d = Distribution::of((1..=20).rev().map(f64::from)).unwrap();
        assert_eq!((d.count, d.min, d.median, d.p90, d.max), (20, 1.0, 10.5, 18.0, 20.0));
        assert_eq!((d.p25, d.p75), (5.0, 15.0));
        let one = Distribution::of([7.0]).unwrap();
        assert_eq!((one.min, one.p25, one.median, one.p90, one.max), (7.0, 7.0, 7.0, 7.0, 7.0));
        assert_eq!(Distribution::of([]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let ratios =
            pairwise(&[Some(2.0), None, Some(9.0), Some(1.0)], &[Some(1.0), Some(5.0), Some(3.0), Some(0.0)])
                .unwrap();
        assert_eq!((ratios.count, ratios.min, ratios.max), (2, 2.0, 3.0));
        assert_eq!(pairwise(&[None], &[Some(1.0)]), None);
    }
}
