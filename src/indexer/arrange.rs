//! Fewer, longer runs: what the policy `bridge` makes of the canonical addresses of an image's blocks.
//!
//! ```text
//! source        |  10  11  12  13  14  15  16  17  18  19  20 |  all non-zero
//! canonical     | 1:0 1:1 0:7 0:8 1:4 1:5 1:6 1:7  own 0:9 own |  image:block, the lowest image first
//! bridge 2      | 1:0 1:1 1:2 1:3 1:4 1:5 1:6 1:7  own 0:9 own |  if blocks 2 and 3 of image 1 hold these very bytes
//! min-run 4     | 1:0 1:1 1:2 1:3 1:4 1:5 1:6 1:7  own own own |  what is left of less than 4 blocks stays at home
//! ```
//!
//! Pure but for one question, which the caller answers by comparing bytes: do these blocks of that image hold what the
//! blocks of a gap hold? No fingerprint is believed here.

use super::compare::Pair;
use std::ops::Range;

/// A break in a run that another image could be read through: the blocks of `gap` (indices into the places) would be
/// read from `image`, `block` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    /// Indices of the places.
    pub gap: Range<usize>,
    /// The image that is read before and after the gap.
    pub image: u32,
    /// Where the gap begins there.
    pub block: u32,
}

/// Every break of at most `bridge` blocks in a run into an image other than `own`, ascending: the run goes on behind it
/// in step, and no zero block (which has no place) lies between. `places` are ascending by source block. A run is seen
/// to go on by the canonical address of a whole block, so a gap never ends at, or reaches over, a partial last block of
/// either image.
pub(super) fn gaps(places: &[Pair], own: u32, bridge: u32) -> Vec<Gap> {
    let mut out = Vec::new();
    for (i, before) in (1..).zip(places) {
        if before.image == own || places.get(i).is_none_or(|p| continues(p, before, 1)) {
            continue;
        }
        for len in 1..=bridge {
            let at = i + len as usize;
            let Some(behind) = places.get(at) else { break };
            if before.source.checked_add(len + 1) != Some(behind.source) {
                break;
            }
            if continues(behind, before, len + 1) {
                out.push(Gap { gap: i..at, image: before.image, block: before.block + 1 });
                break;
            }
        }
    }
    out
}

/// The blocks of the gaps as they would be read.
pub(super) fn pairs_of<'a>(gaps: &'a [Gap], places: &'a [Pair]) -> impl Iterator<Item = Pair> + 'a {
    gaps.iter().flat_map(|g| {
        let blocks = places.get(g.gap.clone()).unwrap_or(&[]);
        blocks.iter().zip(g.block..).map(|(place, block)| Pair { source: place.source, image: g.image, block })
    })
}

/// Reads through the gaps, which were proved to hold the same bytes. From left to right: where two overlap, as they can
/// when runs into two images take turns, the first one wins, and the block behind it belongs to it too.
pub(super) fn bridge(places: &mut [Pair], gaps: &[Gap]) {
    let mut taken = 0;
    for g in gaps.iter() {
        if g.gap.start <= taken {
            continue;
        }
        taken = g.gap.end;
        for (place, block) in places.get_mut(g.gap.clone()).into_iter().flatten().zip(g.block..) {
            (place.image, place.block) = (g.image, block);
        }
    }
}

/// Runs shorter than `min_run` blocks that lead elsewhere, other blocks of the image itself included, stay in place.
pub(super) fn keep_short_runs(places: &mut [Pair], own: u32, min_run: u32) {
    let mut start = 0;
    while start < places.len() {
        let run = 1 + places.get(start..).map_or(0, |rest| rest.windows(2).take_while(|w| continues_pair(w)).count());
        if run < min_run as usize {
            for place in places.get_mut(start..start + run).into_iter().flatten() {
                (place.image, place.block) = (own, place.source);
            }
        }
        start += run;
    }
}

fn continues_pair(window: &[Pair]) -> bool {
    matches!(window, [a, b] if continues(b, a, 1))
}

/// True when `place` is `by` blocks behind `before` in both images.
fn continues(place: &Pair, before: &Pair, by: u32) -> bool {
    place.image == before.image
        && before.source.checked_add(by) == Some(place.source)
        && before.block.checked_add(by) == Some(place.block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: u32 = 2;

    fn pair(source: u32, image: u32, block: u32) -> Pair {
        Pair { source, image, block }
    }

    fn picture() -> Vec<Pair> {
        let at = [(1, 0), (1, 1), (0, 7), (0, 8), (1, 4), (1, 5), (1, 6), (1, 7), (OWN, 18), (0, 9), (OWN, 20)];
        (10..).zip(at).map(|(source, (image, block))| pair(source, image, block)).collect()
    }

    #[test]
    fn the_picture_above() {
        let mut places = picture();
        let found = gaps(&places, OWN, 2);
        assert_eq!(found, [Gap { gap: 2..4, image: 1, block: 2 }]);
        assert_eq!(pairs_of(&found, &places).collect::<Vec<_>>(), [pair(12, 1, 2), pair(13, 1, 3)]);
        bridge(&mut places, &found);
        assert_eq!(places[2..5], [pair(12, 1, 2), pair(13, 1, 3), pair(14, 1, 4)]);
        keep_short_runs(&mut places, OWN, 4);
        assert_eq!(places[7..], [pair(17, 1, 7), pair(18, OWN, 18), pair(19, OWN, 19), pair(20, OWN, 20)]);
    }

    #[test]
    fn what_is_no_gap() {
        assert_eq!(gaps(&picture(), OWN, 1), [], "too long");
        assert!(gaps(&picture(), 1, 2).iter().all(|g| g.image != 1), "the image itself is left to min-run");
        let mut zero = picture();
        zero.remove(3);
        assert_eq!(gaps(&zero, OWN, 8), [], "a zero block ends a run");
        let mut jump = picture();
        jump[4..8].iter_mut().for_each(|p| p.block += 1);
        assert_eq!(gaps(&jump, OWN, 8), [], "not in step");
        assert_eq!(gaps(&[], OWN, 8), []);
        let edge = [pair(u32::MAX - 1, 0, u32::MAX), pair(u32::MAX, 1, 0)];
        assert_eq!(gaps(&edge, OWN, u32::MAX), []);
    }

    #[test]
    fn runs_that_take_turns_are_bridged_from_the_left() {
        let mut places: Vec<Pair> = (0..6).map(|i| pair(i, i % 2, i)).collect();
        let found = gaps(&places, OWN, 8);
        assert_eq!(found.len(), 4);
        bridge(&mut places, &found);
        assert!(places[..5].iter().all(|p| p.image == 0), "{places:?}");
    }

    /// The rule once more, block by block.
    fn model(places: &[Pair], min_run: u32) -> Vec<Pair> {
        let joined = |i: usize, j: usize| (i..j).all(|k| continues(&places[k + 1], &places[k], 1));
        let run_of = |i: usize| (0..places.len()).filter(|&j| joined(i.min(j), i.max(j))).count();
        let keep =
            |(i, p): (usize, &Pair)| if run_of(i) < min_run as usize { pair(p.source, OWN, p.source) } else { *p };
        places.iter().enumerate().map(keep).collect()
    }

    proptest! {
        #[test]
        fn short_runs_stay_and_bridges_are_in_step(
            at in proptest::collection::vec((0u32..4, 0u32..3, 0u32..3), 0..60),
            limit in 0u32..6,
            min_run in 0u32..6,
        ) {
            let mut source = 0;
            let mut places = Vec::new();
            for (skip, image, phase) in at {
                source += 1 + u32::from(skip == 0);
                let block = if image == OWN { source } else { source + phase };
                places.push(pair(source, image, block));
            }
            let before = places.clone();
            let found = gaps(&places, OWN, limit);
            for g in &found {
                prop_assert!(g.gap.len() <= limit as usize && g.image != OWN);
                prop_assert!(continues(&places[g.gap.end], &places[g.gap.start - 1], g.gap.len() as u32 + 1));
            }
            let offered: Vec<Pair> = pairs_of(&found, &places).collect();
            bridge(&mut places, &found);
            for (old, new) in before.iter().zip(&places) {
                prop_assert!(old == new || offered.contains(new));
            }
            let want = model(&places, min_run);
            keep_short_runs(&mut places, OWN, min_run);
            prop_assert_eq!(&places, &want);
        }
    }
}
