//! Latencies of millions of requests in a table of fixed size.

/// Buckets of each power of two: a figure is wrong by less than 1/64.
const STEPS: u64 = 64;

/// Counts of latencies in logarithmic buckets.
#[derive(Debug, Clone)]
pub struct Latencies {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { counts: vec![0; (STEPS * 40) as usize], total: 0 }
    }
}

impl Latencies {
    /// Counts one request.
    pub fn add(&mut self, ns: u64) {
        let last = self.counts.len() - 1;
        self.counts[bucket(ns).min(last)] += 1;
        self.total += 1;
    }

    /// Counts those of another table.
    pub fn merge(&mut self, other: &Latencies) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.total += other.total;
    }

    /// Requests counted.
    pub fn len(&self) -> u64 {
        self.total
    }

    /// The latency in microseconds which this share (0 to 1) of the requests does not exceed; 0 of an empty table.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let want = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= want {
                return middle(i as u64) / 1000.0;
            }
        }
        0.0
    }
}

/// Below `STEPS` a bucket is a nanosecond; from there on each power of two has `STEPS` buckets.
fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let power = u64::from(ns.ilog2() - STEPS.ilog2());
    ((power + 1) * STEPS + (ns >> power) - STEPS) as usize
}

/// Nanoseconds in the middle of a bucket.
fn middle(bucket: u64) -> f64 {
    if bucket < STEPS {
        return bucket as f64;
    }
    let power = bucket / STEPS - 1;
    ((STEPS + bucket % STEPS) << power) as f64 + (1u64 << power) as f64 / 2.0
}
