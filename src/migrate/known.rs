//! What the other side has: where a sender looks a page up, and where a receiver finds it.

use super::bases::{BaseFiles, Bases};
use super::frame::{Pages, Source};
use super::kept::{Kept, Remembered};
use super::stream::{PAGE_BYTES, Place};
use super::template::Template;
use super::wire::Digest;
use crate::store::Pack;
use std::collections::{HashMap, VecDeque};

/// Literals that can be asked for again, at most: the receiver has them in memory.
pub const WINDOW: u64 = 32_768;

/// What a sender knows of the receiver; the same for the whole migration. Threads ask it at once.
pub trait Known: Sync {
    /// Where the receiver has a page that is not zero, if it has it.
    fn find(&self, block: &[u8], place: Place, hash: &Digest, page: &[u8]) -> Option<Source>;
}

/// Of a receiver that has nothing.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Known for Nothing {
    fn find(&self, _: &[u8], _: Place, _: &Digest, _: &[u8]) -> Option<Source> {
        None
    }
}

/// What a sender knows of a receiver that greeted it; each part may be switched off. In the order of a look-up.
#[derive(Debug, Default)]
pub struct Knows {
    /// The memory that the VM had when it left the receiver.
    pub kept: Option<Remembered>,
    /// Base images.
    pub bases: Option<Bases>,
    /// A template.
    pub template: Option<Template>,
}

impl Known for Knows {
    fn find(&self, block: &[u8], place: Place, hash: &Digest, page: &[u8]) -> Option<Source> {
        let kept = self.kept.as_ref().and_then(|kept| kept.find(block, place, hash));
        let base = || self.bases.as_ref().and_then(|bases| bases.find(page));
        let template = || self.template.as_ref().and_then(|template| template.find(hash));
        kept.or_else(base).or_else(template)
    }
}

/// The same at the receiver.
#[derive(Debug)]
pub struct Has {
    /// The memory that the VM had when it left.
    pub kept: Option<Kept>,
    /// Base images.
    pub bases: BaseFiles,
    /// A template.
    pub template: Option<Pack>,
}

impl Pages for &Has {
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.same(block, offset, page))
    }

    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool {
        match source {
            Source::Kept(number) => self.kept.as_ref().is_some_and(|kept| kept.read(number, page)),
            Source::Base { image, block } => self.bases.read(image, block, page),
            Source::Template(number) => {
                let (pack, number) = (self.template.as_ref(), u32::try_from(number));
                let read = pack.zip(number.ok()).map(|(pack, number)| pack.read(number, page));
                read.is_some_and(|read| read.inspect_err(|e| log::warn!("migration: {e}")).is_ok())
            }
            Source::Zero | Source::Literal | Source::Same | Source::Earlier(_) => false,
        }
    }
}

/// The literals that the receiver still has, by their hash: pages that were sent in this migration.
#[derive(Debug)]
pub struct Sent {
    by_hash: HashMap<Digest, u64>,
    window: VecDeque<Digest>,
    next: u64,
    most: u64,
}

impl Sent {
    /// Remembers up to this many.
    pub fn new(most: u64) -> Sent {
        Sent { by_hash: HashMap::new(), window: VecDeque::new(), next: 0, most }
    }

    /// Its number, if it was sent. Else it is sent now, and has one from now on.
    pub fn look(&mut self, hash: &Digest) -> Option<u64> {
        if let Some(number) = self.by_hash.get(hash) {
            return Some(*number);
        }
        let number = self.next;
        self.next += 1;
        if self.most == 0 {
            return None;
        }
        if self.window.len() as u64 == self.most
            && let Some(old) = self.window.pop_front()
        {
            self.by_hash.remove(&old);
        }
        self.window.push_back(*hash);
        self.by_hash.insert(*hash, number);
        None
    }
}

/// The same at the receiver, with their bytes; and whatever else it has.
#[derive(Debug)]
pub struct Received<P> {
    window: VecDeque<Box<[u8; PAGE_BYTES]>>,
    first: u64,
    most: u64,
    others: P,
}

impl<P> Received<P> {
    /// Keeps up to this many literals: as many as the sender remembers.
    pub fn new(most: u64, others: P) -> Self {
        Received { window: VecDeque::new(), first: 0, most, others }
    }

    /// The literals of a frame that was right.
    pub fn keep(&mut self, literals: &[u8]) {
        for page in literals.as_chunks::<PAGE_BYTES>().0 {
            if self.most == 0 {
                self.first += 1;
            } else if self.window.len() as u64 == self.most
                && let Some(mut old) = self.window.pop_front()
            {
                self.first += 1;
                *old = *page;
                self.window.push_back(old);
            } else {
                self.window.push_back(Box::new(*page));
            }
        }
    }
}

impl<P: Pages> Pages for Received<P> {
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        self.others.same(block, offset, page)
    }

    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool {
        let Source::Earlier(number) = source else { return self.others.find(source, page) };
        let index = number.checked_sub(self.first).and_then(|n| usize::try_from(n).ok());
        let found = index.and_then(|n| self.window.get(n));
        found.inspect(|found| *page = ***found).is_some()
    }
}

/// Pages of a receiver that has nothing.
impl Pages for Nothing {
    fn same(&mut self, _: &[u8], _: u64, _: &mut [u8; PAGE_BYTES]) -> bool {
        false
    }

    fn find(&mut self, _: Source, _: &mut [u8; PAGE_BYTES]) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both windows slide alike: whatever the sender says was sent, the receiver has, and it is that.
    #[test]
    fn what_was_sent_is_there() {
        for most in [0, 1, 7, 100] {
            let (mut sent, mut received) = (Sent::new(most), Received::new(most, Nothing));
            let mut hits = 0;
            for n in 0..1000u64 {
                let content = (n * n + n / 3) % 23;
                let page = [content as u8; PAGE_BYTES];
                let hash = *blake3::hash(&page).as_bytes();
                match sent.look(&hash) {
                    Some(number) => {
                        let mut found = [0; PAGE_BYTES];
                        assert!(received.find(Source::Earlier(number), &mut found), "{most}: {number}");
                        assert_eq!(found, page);
                        hits += 1;
                    }
                    None => received.keep(&page),
                }
            }
            assert_eq!(most == 0, hits == 0, "{most}: {hits}");
        }
    }
}
