//! Brings a snapshot back: its disks as new overlays, its memory as the stream of a migration that QEMU waits for.
//!
//! Every page is compared with its hash. A pack that is not in one store, or rotten there, is read from another; a page that may be
//! lost, and is in no store any more, comes back as zeros.

use super::file::{Disk, Snapshot};
use super::keep::{check, threads};
use super::place;
use super::skeleton::Piece;
use super::stores::{Store, Stores};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Observer;
use crate::library::Library;
use crate::migrate::bases::BaseFiles;
use crate::migrate::disk::ArrivingDisk;
use crate::migrate::order::{Permits, Reorder};
use crate::store::manifest::{Held, Page};
use crate::store::{Digest, Pack, PackId};
use crate::units::to_usize;
use rustix::fs::{Mode, OFlags, open};
use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

/// Pieces that are under way at once, for each thread.
const AHEAD: usize = 3;
/// Blocks of a disk that are read at a time.
const BLOCKS: usize = 1024;

/// A pack, in the stores that have it.
struct Copies<'a> {
    id: PackId,
    /// It may be lost.
    once: bool,
    copies: Vec<(&'a Store, OnceLock<Option<Pack>>)>,
}

/// Where the pages of a snapshot come from. Threads read at once.
pub struct Pages<'a> {
    snapshot: &'a Snapshot,
    packs: Vec<Copies<'a>>,
    images: BaseFiles,
    spool: &'a Path,
    lost: AtomicU64,
    /// URLs of stores that did not answer.
    troubles: Mutex<HashSet<String>>,
}

impl<'a> Pages<'a> {
    /// Of a snapshot in these stores. Packs of stores that are no directories go through a file in `spool` without a name.
    ///
    /// # Errors
    /// A pack that is needed is in no store, or an image that is needed is not in the library.
    pub fn new(
        stores: &'a Stores,
        snapshot: &'a Snapshot,
        library: Option<&Library>,
        spool: &'a Path,
    ) -> Result<Pages<'a>> {
        let once = snapshot.once();
        let mut packs = Vec::new();
        for id in &snapshot.memory.packs {
            let copies: Vec<_> = stores.with(*id).into_iter().map(|store| (store, OnceLock::new())).collect();
            let once = once.contains(id);
            if copies.is_empty() && !once {
                return Err(missing(snapshot, *id));
            }
            packs.push(Copies { id: *id, once, copies });
        }
        let digests = snapshot.image_digests();
        let images = library.map_or_else(BaseFiles::none, |library| BaseFiles::open(library, digests));
        let mut used = snapshot.memory.images_used();
        snapshot.disks.iter().for_each(|disk| used.extend(disk.data.images_used()));
        for number in used {
            if !images.has(number) {
                return Err(no_image(snapshot, number));
            }
        }
        Ok(Pages { snapshot, packs, images, spool, lost: AtomicU64::new(0), troubles: Mutex::default() })
    }

    /// Pages that came back as zeros because nobody has them any more.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Fills in a page. True: it is zero.
    fn read(&self, page: &Page, out: &mut [u8; 4096]) -> Result<bool> {
        match page.held {
            Held::Zero => {
                out.fill(0);
                Ok(true)
            }
            Held::Pack { pack, page: number } => self.packed(pack, number, &page.hash, out),
            Held::Image { image, block } => {
                if self.images.read(image, block, out) && blake3::hash(out).as_bytes() == &page.hash {
                    return Ok(false);
                }
                let name =
                    self.snapshot.about.images.get(to_usize(image.into())).map_or("", |image| image.name.as_str());
                Err(Error::new(
                    ErrorKind::Changed,
                    format!("image {name}"),
                    format!("block {block} is not what it was"),
                )
                .mend("'vmar image verify' says what has changed; bring the image back"))
            }
            Held::Elsewhere => Err(Error::new(ErrorKind::Corrupt, self.name(), "a page is nowhere")),
        }
    }

    fn packed(&self, number: u32, page: u32, hash: &Digest, out: &mut [u8; 4096]) -> Result<bool> {
        let Some(pack) = self.packs.get(to_usize(number.into())) else {
            return Err(Error::new(ErrorKind::Corrupt, self.name(), "a page is in a pack that there is not"));
        };
        // A store that does not answer costs its patience with each pack, so it is asked when no other one is left.
        for late in [false, true] {
            for (store, copy) in &pack.copies {
                if copy.get().is_none() && self.is_in_trouble(store) != late {
                    continue;
                }
                let Some(opened) = copy.get_or_init(|| self.open(store, pack.id)) else { continue };
                // The pack compares the page with the hash that it has for it; that has to be the one that is wanted.
                if opened.hashes().get(to_usize(page.into())) != Some(hash) {
                    let cause = format!("page {page} of pack {} is another one than it says", hex(&pack.id.0));
                    return Err(Error::new(ErrorKind::Corrupt, self.name(), cause).mend("take the snapshot again"));
                }
                match opened.read(page, out) {
                    Ok(()) => return Ok(false),
                    Err(e) => log::warn!("store {}: {e}; another one is asked", store.url()),
                }
            }
        }
        if pack.once {
            self.lost.fetch_add(1, Ordering::Relaxed);
            out.fill(0);
            return Ok(true);
        }
        Err(missing(self.snapshot, pack.id))
    }

    fn open(&self, store: &Store, id: PackId) -> Option<Pack> {
        let opened = fetch(store, id, self.spool);
        if let Err(e) = &opened {
            log::warn!("store {}: {e}; another one is asked", store.url());
            if e.kind() == ErrorKind::Io {
                self.troubles.lock().unwrap_or_else(PoisonError::into_inner).insert(store.url().into());
            }
        }
        opened.ok()
    }

    fn is_in_trouble(&self, store: &Store) -> bool {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).contains(store.url())
    }

    fn name(&self) -> String {
        format!("snapshot {}", self.snapshot.about.name)
    }
}

fn missing(snapshot: &Snapshot, PackId(id): PackId) -> Error {
    let cause = format!("no store has a whole copy of pack {}", hex(&id));
    Error::new(ErrorKind::NotFound, format!("snapshot {}", snapshot.about.name), cause)
        .mend("name all stores that it was saved to; 'vmar snapshot check' shows what each has")
}

fn no_image(snapshot: &Snapshot, number: u32) -> Error {
    let image = snapshot.about.images.get(to_usize(number.into()));
    let (name, digest) = image.map_or(("", ""), |image| (&image.name, &image.digest));
    let cause = format!("needs image {name} (content {digest}), and the library does not have it");
    Error::new(ErrorKind::NotFound, format!("snapshot {}", snapshot.about.name), cause)
        .mend("name the library with --library, or add the image to it again")
}

/// Opens a pack of a store; one that is no file here gets one without a name.
pub fn fetch(store: &Store, id: PackId, spool: &Path) -> Result<Pack> {
    let key = place::pack_key(id);
    if let Some(path) = store.place().path(&key) {
        return Pack::open(&path, id);
    }
    let bytes = store.place().get(&key)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = open(spool, flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(file.map_err(|e| Error::io(spool, "make a file in it", e.into()))?);
    file.write_all(&bytes).map_err(|e| Error::io(spool, "keep a pack there for a while", e))?;
    Pack::of_file(Path::new(&format!("{}/{key}", store.url())), file, id)
}

/// Does numbered jobs on all processors, and hands the results on in order.
fn in_order<T: Send>(
    jobs: usize,
    stop: &AtomicBool,
    make: impl Fn(usize) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let (next, permits) = (AtomicUsize::new(0), Permits::new(AHEAD * threads()));
    let (send, made) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            let (send, next, permits, make) = (send.clone(), &next, &permits, &make);
            scope.spawn(move || {
                // The permit comes first: whoever has the lowest number must never wait for one.
                while permits.take() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= jobs || send.send((number, make(number))).is_err() {
                        permits.give();
                        return;
                    }
                }
            });
        }
        drop(send);
        let mut order = Reorder::default();
        let mut all = || {
            for (number, result) in &made {
                check(stop)?;
                for result in order.push(number as u64, result) {
                    take(result?)?;
                    permits.give();
                }
            }
            Ok(())
        };
        let result = all();
        permits.close();
        result
    })
}

/// Writes the stream of the VM. Nothing of it is left out: when this returns, QEMU has got all it needs.
///
/// # Errors
/// QEMU has hung up, or a page cannot be had.
pub fn memory(pages: &Pages<'_>, to: &mut impl Write, observer: &dyn Observer, stop: &AtomicBool) -> Result<()> {
    let Snapshot { memory, skeleton, about, .. } = pages.snapshot;
    let starts: Vec<u64> = memory
        .blocks
        .iter()
        .scan(0, |at, block| {
            let start = *at;
            *at += block.len / 4096;
            Some(start)
        })
        .collect();
    observer.begin("restoring memory", about.stream_bytes);
    let make = |number: usize| {
        let mut out = Vec::new();
        let Some(piece) = skeleton.pieces.get(number) else { return Ok(out) };
        let first =
            if let Piece::Pages { block, .. } = piece { starts.get(usize::from(*block)).copied() } else { None };
        piece.write(&memory.blocks, &mut out, |_, page, content| {
            let page = memory.pages.get(to_usize(first.unwrap_or(0) + page)).copied().unwrap_or(Page::ZERO);
            pages.read(&page, content)
        })?;
        Ok(out)
    };
    in_order(skeleton.pieces.len(), stop, make, |bytes: Vec<u8>| {
        to.write_all(&bytes).map_err(|e| {
            Error::new(ErrorKind::Io, "QEMU", format!("it has ended the migration: {e}")).mend(
                "see its log; it has to be started with the same machine, memory and devices as the VM that was saved",
            )
        })?;
        observer.advance(bytes.len() as u64);
        Ok(())
    })?;
    observer.end();
    Ok(())
}

/// Writes a disk into an empty overlay, and puts that in its place.
///
/// # Errors
/// A block cannot be had, or written.
pub fn disk(
    pages: &Pages<'_>,
    disk: &Disk,
    write_cache: bool,
    to: &mut dyn ArrivingDisk,
    observer: &dyn Observer,
    stop: &AtomicBool,
) -> Result<()> {
    // Blocks with data, by their place on the disk.
    let numbers = disk.runs.iter().filter(|run| run.data).flat_map(|run| run.first..run.first + run.blocks);
    let data: Vec<(u64, Page)> = numbers.zip(disk.data.pages.iter().copied()).collect();
    observer.begin("restoring disk", data.len() as u64 * 4096);
    let chunks: Vec<_> = data.chunks(BLOCKS).collect();
    let make = |number: usize| {
        let blocks = chunks.get(number).copied().unwrap_or_default();
        let read = |(block, page): &(u64, Page)| {
            let mut content = Box::new([0; 4096]);
            let zero = pages.read(page, &mut content)?;
            Ok((*block, if zero { None } else { Some(content) }))
        };
        blocks.iter().map(read).collect::<Result<Vec<_>>>()
    };
    in_order(chunks.len(), stop, make, |blocks| {
        observer.advance(blocks.len() as u64 * 4096);
        blocks.iter().try_for_each(|(block, content)| to.write(*block, content.as_deref()))
    })?;
    for run in disk.runs.iter().filter(|run| !run.data) {
        (run.first..run.first + run.blocks).try_for_each(|block| to.write(block, None))?;
    }
    observer.end();
    to.settle(write_cache)
}
