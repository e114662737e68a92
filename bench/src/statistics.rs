//! Distributions of a few dozen figures: kept whole, so that nothing is lost to buckets.

use serde::{Deserialize, Serialize};
use statrs::stats_tests::Alternative;
use statrs::stats_tests::mannwhitneyu::{MannWhitneyUMethod, mannwhitneyu};

/// A sample's distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

/// The slope of the straight line that fits `points`, (x, y), with the least squares; `None` unless there are two
/// different x.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mean_x, mean_y) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    (spread > 0.0)
        .then(|| points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / spread)
        .filter(|slope| slope.is_finite())
}

/// Figures of two samples together up to which every way to mix them is counted; beyond, the normal distribution is
/// near enough.
const MOST_EXACT: usize = 60;

/// How likely two samples from one and the same distribution would differ in rank at least as much as these do
/// (Mann and Whitney, two-sided); 1 if either is empty.
///
/// Ranks only: a run that took ten times as long counts as one that took longer, whatever else the machine did.
pub fn likelihood_of_chance(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 1.0;
    }
    if a.len() + b.len() <= MOST_EXACT {
        return exact_likelihood(a, b);
    }
    // Its exact method is not used: with samples of one size, statrs 0.19 gives the complement of what it should.
    let method = MannWhitneyUMethod::AsymptoticInclContinuityCorrection;
    mannwhitneyu(a, b, method, Alternative::TwoSided)
        .map_or(1.0, |(_, p)| if p.is_finite() { p } else { 1.0 })
}

/// The same by counting, of all ways to choose `a.len()` of the figures, those whose ranks add up to a sum at least
/// as far from the middle. Figures that are equal share the mean of their ranks.
fn exact_likelihood(a: &[f64], b: &[f64]) -> f64 {
    let all = [a, b].concat();
    // Twice the rank is a whole number: one for each figure below, another for each that is not above.
    let rank = |x: &f64| {
        let count = |of: fn(f64, f64) -> bool| all.iter().filter(|y| of(**y, *x)).count();
        count(|y, x| y < x) + count(|y, x| y <= x) + 1
    };
    let most: usize = all.iter().map(rank).sum();
    // ways[n][sum]: of how many ways to choose n of the figures looked at so far `sum` is the sum of ranks.
    let mut ways = vec![vec![0.0f64; most + 1]; a.len() + 1];
    ways[0][0] = 1.0;
    for rank in all.iter().map(rank) {
        for n in (1..=a.len()).rev() {
            for sum in (rank..=most).rev() {
                ways[n][sum] += ways[n - 1][sum - rank];
            }
        }
    }
    let observed: usize = a.iter().map(rank).sum();
    // Twice the sum's distance from its middle, so that it is a whole number too.
    let distance = |sum: usize| (sum * 2).abs_diff(2 * a.len() * (all.len() + 1));
    let far = |(sum, _): &(usize, &f64)| distance(*sum) >= distance(observed);
    let chosen = &ways[a.len()];
    chosen.iter().enumerate().filter(far).map(|(_, ways)| ways).sum::<f64>() / chosen.iter().sum::<f64>()
}

/// The likelihoods of many comparisons, each raised so that, of those that stay under a bound, no larger a share than
/// the bound is expected to be chance (Benjamini and Hochberg).
pub fn of_many(likelihoods: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..likelihoods.len()).collect();
    order.sort_by(|a, b| likelihoods[*b].total_cmp(&likelihoods[*a]));
    let mut raised = vec![1.0; likelihoods.len()];
    let mut least = 1.0f64;
    for (place, which) in order.into_iter().enumerate() {
        let rank = likelihoods.len() - place;
        least = least.min(likelihoods[which] * likelihoods.len() as f64 / rank as f64);
        raised[which] = least;
    }
    raised
}

/// How large `new` is beside `old`: the distribution of the ratios of every figure of one to every figure of the other,
/// whose median is the usual estimate of a shift between two samples (Hodges and Lehmann).
pub fn ratio_of_all(new: &[f64], old: &[f64]) -> Option<Distribution> {
    let ratios = new.iter().flat_map(|new| old.iter().map(move |old| new / old));
    Distribution::of(ratios.filter(|ratio| ratio.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_lines() {
        assert_eq!(slope(&[(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)]), Some(2.0));
        assert_eq!(slope(&[(1.0, 3.0), (1.0, 5.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    #[test]
    fn samples_apart_are_no_chance_and_equal_ones_are() {
        let low: Vec<f64> = (0..7).map(f64::from).collect();
        let high: Vec<f64> = low.iter().map(|x| x + 100.5).collect();
        // Two of the 3432 ways in which seven and seven can be mixed.
        assert!((likelihood_of_chance(&low, &high) - 2.0 / 3432.0).abs() < 1e-9);
        assert!((likelihood_of_chance(&high, &low) - 2.0 / 3432.0).abs() < 1e-9);
        // scipy 1.11: mannwhitneyu(x, y, method="exact").
        let (x, y) = ([5.0, 2.0, 7.0, 8.0, 9.0, 3.0, 11.0, 12.0], [1.0, 6.0, 10.0, 4.0]);
        assert!((likelihood_of_chance(&x, &y) - 0.46060606060606063).abs() < 1e-9);
        // By hand: of the six ways to choose two of 1, 2, 2, 3, only those with sums of ranks 3.5 and 6.5 are as far.
        assert!((likelihood_of_chance(&[1.0, 2.0], &[2.0, 3.0]) - 4.0 / 6.0).abs() < 1e-9);
        let between: Vec<f64> = low.iter().map(|x| x + 0.5).collect();
        assert!(likelihood_of_chance(&low, &between) > 0.3);
        assert_eq!(likelihood_of_chance(&[1.0; 5], &[1.0; 9]), 1.0);
        assert_eq!(likelihood_of_chance(&[], &low), 1.0);
        let many: Vec<f64> = (0..200).map(f64::from).collect();
        let more: Vec<f64> = many.iter().map(|x| x + 150.0).collect();
        assert!(likelihood_of_chance(&many, &more) < 1e-6);
        assert!(likelihood_of_chance(&[1.0, 1.0, 1.0, 2.0], &[8.0, 8.0, 9.0, 9.0]) < 0.05);
    }

    #[test]
    fn of_many_comparisons_some_look_unlikely() {
        assert_eq!(of_many(&[0.01, 0.04, 0.03, 0.005]), [0.02, 0.04, 0.04, 0.02]);
        assert_eq!(of_many(&[0.04]), [0.04]);
        assert!(of_many(&[0.04, 0.9, 0.8, 0.7])[0] > 0.15);
        assert!(of_many(&[]).is_empty());
    }

    #[test]
    fn ratios_of_all_have_the_shift_in_their_middle() {
        let old = [10.0, 11.0, 12.0];
        let new = old.map(|x| x * 2.0);
        assert_eq!(ratio_of_all(&new, &old).unwrap().median, 2.0);
        assert_eq!(ratio_of_all(&new, &[0.0]), None);
    }

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
