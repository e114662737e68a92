//! Statistics of a few dozen values, all of which are kept.

use serde::{Deserialize, Serialize};
use statrs::stats_tests::Alternative;
use statrs::stats_tests::mannwhitneyu::{MannWhitneyUMethod, mannwhitneyu};

/// A sample's distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The number of values.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// The lower quartile.
    pub p25: f64,
    /// The median; for an even number of values, the mean of the two in the middle.
    pub median: f64,
    /// The upper quartile.
    pub p75: f64,
    /// The 90th percentile.
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

/// The smallest value that at least this share of all values does not exceed. It is always one of the values.
fn nearest_rank(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The ratios of values of the same round. Rounds in which one is missing are left out.
pub fn pairwise(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<Distribution> {
    let pairs = ours.iter().zip(theirs).filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?));
    Distribution::of(pairs.filter(|ratio| ratio.is_finite()))
}

/// The slope of the straight line that fits the points (x, y) by least squares; `None` without two different
/// x.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mean_x, mean_y) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    (spread > 0.0)
        .then(|| points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / spread)
        .filter(|slope| slope.is_finite())
}

/// Up to this number of values in both samples together, the p-value is exact. Beyond, the normal
/// distribution is a good approximation.
const MAX_EXACT: usize = 60;

/// The p-value of the two-sided Mann-Whitney U test: the probability that two samples of one distribution
/// differ in rank at least as much as these do. It is 1 if a sample is empty.
///
/// Only ranks count. A run that took ten times as long counts like one that took a little longer, so that
/// disturbances of the machine weigh less.
pub fn p_value(a: &[f64], b: &[f64]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 1.0;
    }
    if a.len() + b.len() <= MAX_EXACT {
        return exact_p_value(a, b);
    }
    // The exact method of statrs 0.19 is not used: for samples of the same size it returns the complement.
    let method = MannWhitneyUMethod::AsymptoticInclContinuityCorrection;
    mannwhitneyu(a, b, method, Alternative::TwoSided)
        .map_or(1.0, |(_, p)| if p.is_finite() { p } else { 1.0 })
}

/// The exact p-value. It counts the ways to choose `a.len()` of all values, and those of them whose ranks add
/// up to a sum at least as far from the middle as observed. Equal values share the mean of their ranks.
fn exact_p_value(a: &[f64], b: &[f64]) -> f64 {
    let all = [a, b].concat();
    // Twice the rank is a whole number: one for each value below, and one more for each value that is not
    // above.
    let rank = |x: &f64| {
        let count = |of: fn(f64, f64) -> bool| all.iter().filter(|y| of(**y, *x)).count();
        count(|y, x| y < x) + count(|y, x| y <= x) + 1
    };
    let most: usize = all.iter().map(rank).sum();
    // ways[n][sum]: in how many ways n of the values so far can be chosen so that their ranks add up to
    // `sum`.
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
    // Twice the distance of a sum from the middle, which is a whole number too.
    let distance = |sum: usize| (sum * 2).abs_diff(2 * a.len() * (all.len() + 1));
    let far = |(sum, _): &(usize, &f64)| distance(*sum) >= distance(observed);
    let chosen = &ways[a.len()];
    chosen.iter().enumerate().filter(far).map(|(_, ways)| ways).sum::<f64>() / chosen.iter().sum::<f64>()
}

/// P-values adjusted for the number of comparisons by the method of Benjamini and Hochberg: of those under a
/// bound, the expected share of false discoveries is at most the bound.
pub fn adjusted_p_values(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*b].total_cmp(&p_values[*a]));
    let mut adjusted = vec![1.0; p_values.len()];
    let mut least = 1.0f64;
    for (place, which) in order.into_iter().enumerate() {
        let rank = p_values.len() - place;
        least = least.min(p_values[which] * p_values.len() as f64 / rank as f64);
        adjusted[which] = least;
    }
    adjusted
}

/// The ratios of every value of `new` to every value of `old`. Their median estimates the factor between the
/// samples, as the Hodges-Lehmann estimator does for a shift.
pub fn ratios(new: &[f64], old: &[f64]) -> Option<Distribution> {
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
        assert!((p_value(&low, &high) - 2.0 / 3432.0).abs() < 1e-9);
        assert!((p_value(&high, &low) - 2.0 / 3432.0).abs() < 1e-9);
        // scipy 1.11: mannwhitneyu(x, y, method="exact").
        let (x, y) = ([5.0, 2.0, 7.0, 8.0, 9.0, 3.0, 11.0, 12.0], [1.0, 6.0, 10.0, 4.0]);
        assert!((p_value(&x, &y) - 0.46060606060606063).abs() < 1e-9);
        // By hand: of the six ways to choose two of 1, 2, 2, 3, only those with sums of ranks 3.5 and 6.5 are
        // as far.
        assert!((p_value(&[1.0, 2.0], &[2.0, 3.0]) - 4.0 / 6.0).abs() < 1e-9);
        let between: Vec<f64> = low.iter().map(|x| x + 0.5).collect();
        assert!(p_value(&low, &between) > 0.3);
        assert_eq!(p_value(&[1.0; 5], &[1.0; 9]), 1.0);
        assert_eq!(p_value(&[], &low), 1.0);
        let many: Vec<f64> = (0..200).map(f64::from).collect();
        let more: Vec<f64> = many.iter().map(|x| x + 150.0).collect();
        assert!(p_value(&many, &more) < 1e-6);
        assert!(p_value(&[1.0, 1.0, 1.0, 2.0], &[8.0, 8.0, 9.0, 9.0]) < 0.05);
    }

    #[test]
    fn of_many_comparisons_some_look_unlikely() {
        assert_eq!(adjusted_p_values(&[0.01, 0.04, 0.03, 0.005]), [0.02, 0.04, 0.04, 0.02]);
        assert_eq!(adjusted_p_values(&[0.04]), [0.04]);
        assert!(adjusted_p_values(&[0.04, 0.9, 0.8, 0.7])[0] > 0.15);
        assert!(adjusted_p_values(&[]).is_empty());
    }

    #[test]
    fn ratios_of_all_have_the_shift_in_their_middle() {
        let old = [10.0, 11.0, 12.0];
        let new = old.map(|x| x * 2.0);
        assert_eq!(ratios(&new, &old).unwrap().median, 2.0);
        assert_eq!(ratios(&new, &[0.0]), None);
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
