//! From a sample of contents to figures with 95 % confidence intervals. Pure functions.
//!
//! Every distinct content is in the sample with probability 1/N, independently of all others: by a hash of its bytes, so that
//! it is in the sample of each file that holds it, or of none. With *z* = 1.96 and *q* = 1 − 1/N:
//!
//! - **A number of contents** T of which n are in the sample: n is binomial(T, 1/N), so T is estimated by nN. The interval
//!   holds the T for which n is within z standard deviations of its mean, (n − T/N)² ≤ z² q T/N, the *score* interval:
//!   T = N·(n + z²q/2 ± z √(qn + z²q²/4)). It is right for small n too; for n = 0 it ends at 3.84 qN.
//! - **A share** of them, k of n: the sample is a random one of the contents of the whole, so k is hypergeometric. The
//!   interval is Wilson's, for n/q trials, which takes the finite whole into account: N = 1 leaves no doubt.
//! - **A sum of weights** over contents (a content that k files hold counts k − 1): an estimate like a number of contents of
//!   the mean weight w = Σy²/Σy, which has the same variance.
//!
//! Nothing here depends on how often a content repeats inside a file: one that fills half a disk is one content.

use serde::Serialize;

/// Standard deviations to each side that hold 95 % of a normal distribution.
const Z: f64 = 1.959_964;

/// An estimate, and where the truth is in 95 of 100 samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The estimate.
    pub estimate: f64,
    /// Low end.
    pub low: f64,
    /// High end.
    pub high: f64,
}

impl Interval {
    /// Half the width.
    pub fn margin(&self) -> f64 {
        (self.high - self.low) / 2.0
    }

    /// What is known for certain: the figure is no less than `min` and no more than `max`.
    #[must_use]
    pub fn within(self, min: f64, max: f64) -> Interval {
        // `min` last: a caller with contradicting bounds gets a number, and no panic.
        let clamp = |x: f64| x.min(max).max(min);
        Interval { estimate: clamp(self.estimate), low: clamp(self.low), high: clamp(self.high) }
    }

    /// The interval of `a - x`.
    #[must_use]
    pub fn subtracted_from(self, a: f64) -> Interval {
        Interval { estimate: a - self.estimate, low: a - self.high, high: a - self.low }
    }

    /// The interval of `x * factor`, for a factor that is not negative.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Interval {
        Interval { estimate: self.estimate * factor, low: self.low * factor, high: self.high * factor }
    }
}

/// The share of contents that is left out of the sample.
fn q(one_in: u64) -> f64 {
    1.0 - 1.0 / one_in.max(1) as f64
}

/// How many contents there are, if `n` of them are in a sample of one in `one_in`.
pub fn count(n: f64, one_in: u64) -> Interval {
    let (q, scale) = (q(one_in), one_in.max(1) as f64);
    let middle = n + Z * Z * q / 2.0;
    let half = Z * (q * n + (Z * q / 2.0).powi(2)).sqrt();
    Interval { estimate: n, low: (middle - half).max(0.0), high: middle + half }.scaled(scale)
}

/// The sum of the weights of all contents, if those in the sample add up to `sum` and their squares to `squares`; none
/// weighs more than `max`.
pub fn weighted(sum: f64, squares: f64, max: f64, one_in: u64) -> Interval {
    // Nothing was seen: what was not may weigh whatever it can.
    let weight = if sum > 0.0 { squares / sum } else { max };
    if weight <= 0.0 {
        Interval { estimate: 0.0, low: 0.0, high: 0.0 }
    } else {
        count(sum / weight, one_in).scaled(weight)
    }
}

/// Which share of the contents has a property that `k` of the `n` in the sample have.
pub fn share(k: u64, n: u64, one_in: u64) -> Interval {
    let q = q(one_in);
    if n == 0 {
        return Interval { estimate: 0.0, low: 0.0, high: if q == 0.0 { 0.0 } else { 1.0 } };
    }
    let found = k as f64 / n as f64;
    // z² for each of the trials that n are worth.
    let doubt = Z * Z * q / n as f64;
    let middle = (found + doubt / 2.0) / (1.0 + doubt);
    let half = (doubt * found * (1.0 - found) + (doubt / 2.0).powi(2)).sqrt() / (1.0 + doubt);
    // Rounding must not put the estimate outside.
    let (low, high) = ((middle - half).clamp(0.0, found), (middle + half).clamp(found, 1.0));
    Interval { estimate: found, low, high }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_exactly(found: Interval, want: f64) -> bool {
        [found.estimate, found.low, found.high].iter().all(|x| (x - want).abs() < 1e-9 * want.max(1.0))
    }

    #[test]
    fn a_sample_of_everything_leaves_no_doubt() {
        assert!(is_exactly(count(12345.0, 1), 12345.0));
        assert!(is_exactly(weighted(70.0, 300.0, 9.0, 1), 70.0));
        assert!(is_exactly(weighted(0.0, 0.0, 0.0, 64), 0.0));
        assert!(is_exactly(share(3, 4, 1), 0.75));
        assert!(is_exactly(share(0, 0, 1), 0.0));
    }

    #[test]
    fn the_ends_are_those_of_the_formulas() {
        // 100 of a sample of one in 64: (n - T/64)² = z² q T/64 at both ends.
        let found = count(100.0, 64);
        for end in [found.low, found.high] {
            let mean = end / 64.0;
            let want = Z * Z * (63.0 / 64.0) * mean;
            assert!(((100.0 - mean).powi(2) - want).abs() < 1e-6, "{end}");
        }
        assert_eq!(found.estimate, 6400.0);
        let none = count(0.0, 64);
        assert!(none.low == 0.0 && (none.high - 3.8415 * 63.0).abs() < 0.1, "{none:?}");
        // Wilson's interval for 10 of 50 is 0.112 to 0.330; a sample of half the whole narrows it.
        let wilson = share(10, 50, 1 << 40);
        assert!((wilson.low - 0.1124).abs() < 1e-3 && (wilson.high - 0.3304).abs() < 1e-3, "{wilson:?}");
        assert!(share(10, 50, 2).margin() < 0.75 * wilson.margin());
        assert!(share(0, 50, 64).high > 0.05 && share(50, 50, 64).low < 0.95);
    }

    proptest! {
        #[test]
        fn the_estimate_lies_in_its_interval(n in 0u64..1_000_000, part in 0.0f64..=1.0, one_in in 1u64..5000) {
            let k = (n as f64 * part) as u64;
            for found in [
                count(n as f64, one_in), weighted(n as f64, 3.0 * n as f64, 5.0, one_in), share(k, n, one_in),
            ] {
                prop_assert!(0.0 <= found.low && found.low <= found.estimate && found.estimate <= found.high);
            }
            prop_assert!(share(k, n, one_in).high <= 1.0);
        }
    }
}
