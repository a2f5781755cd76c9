//! What `vmar snapshot` tells.

use super::Common;
use super::output::{Table, percent, print_json};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::introspect::Class;
use crate::snapshot::file::{Kernel, Snapshot};
use crate::snapshot::keep::Count;
use crate::snapshot::mend::{Fault, Findings};
use crate::snapshot::restore::Pages;
use crate::snapshot::save::Saved;
use crate::snapshot::stores::Stores;
use crate::store::manifest::{Held, Page};
use crate::units::human_bytes;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Characters of the longest bar, and of a line of the map.
const BAR: u64 = 40;
const MAP: usize = 64;
/// Lines of the map.
const MAP_LINES: usize = 8;

/// After a save.
pub fn saved(common: &Common, stores: &Stores, saved: &Saved) -> Result<()> {
    let about = &saved.about;
    let names = Class::ALL.iter().map(|class| class.name()).chain(["disk"]);
    let used: Vec<(&str, &Count)> = names.zip(&saved.counts).filter(|(_, count)| count.pages > 0).collect();
    if common.json {
        let counts: serde_json::Map<String, Value> =
            used.iter().map(|(name, count)| (name.to_string(), json!(count))).collect();
        return print_json(&json!({"about": about, "pages": counts, "memory_bytes": saved.memory_bytes,
            "new_bytes": saved.new_bytes, "new_packs": saved.new_packs, "snapshot_bytes": saved.snapshot_bytes,
            "written_bytes": saved.written_bytes, "stores": stores.all().len(),
            "stood_ms": saved.stood.as_secs_f64() * 1e3, "seconds": saved.took.as_secs_f64()}));
    }
    let mut table = Table::new(&["pages", "all", "zero", "base image", "in stores", "same", "new", "new, once"], 1);
    let mut sum = Count::default();
    for (name, count) in &used {
        table.row(row(name, count));
        for (all, more) in [
            (&mut sum.pages, count.pages),
            (&mut sum.zero, count.zero),
            (&mut sum.base, count.base),
            (&mut sum.known, count.known),
            (&mut sum.same, count.same),
            (&mut sum.critical, count.critical),
            (&mut sum.once, count.once),
        ] {
            *all += more;
        }
    }
    table.row(row("all", &sum));
    table.print();
    println!("kernel: {}", kernel(&about.kernel));
    let native = about.stream_bytes * stores.all().len() as u64;
    println!(
        "snapshot {} of VM {}: stood still {:.0} ms, {:.1} s in all; {} written to {} stores, {} for as many whole copies of {}",
        about.name,
        about.vm,
        saved.stood.as_secs_f64() * 1e3,
        saved.took.as_secs_f64(),
        human_bytes(saved.written_bytes),
        stores.all().len(),
        percent(saved.written_bytes, native),
        human_bytes(about.stream_bytes),
    );
    Ok(())
}

fn row(name: &str, c: &Count) -> Vec<String> {
    let numbers = [c.pages, c.zero, c.base, c.known, c.same, c.critical, c.once];
    std::iter::once(name.to_string()).chain(numbers.iter().map(u64::to_string)).collect()
}

fn kernel(kernel: &Kernel) -> String {
    match kernel {
        Kernel::Known { release, btf: true } => format!("Linux {release}"),
        Kernel::Known { release, btf: false } => {
            format!("Linux {release}, without BTF: all page cache counts as dirty")
        }
        Kernel::Doubt(why) => format!("unknown, so every page is critical: {why}"),
    }
}

/// After a restore.
pub fn restored(
    common: &Common,
    snapshot: &Snapshot,
    pages: &Pages<'_>,
    runs: Option<bool>,
    time: Duration,
) -> Result<()> {
    let lost = pages.lost();
    if common.json {
        return print_json(
            &json!({"name": snapshot.about.name, "vm": snapshot.about.vm, "runs": runs, "lost_pages": lost,
            "stream_bytes": snapshot.about.stream_bytes, "disk_bytes": snapshot.disk_bytes(), "seconds": time.as_secs_f64()}),
        );
    }
    let state = match runs {
        Some(true) => "runs",
        Some(false) => "is loaded, and stands still",
        None => "has its disks",
    };
    println!("VM {} {state}: snapshot {}, {:.1} s", snapshot.about.vm, snapshot.about.name, time.as_secs_f64());
    if lost > 0 {
        println!(
            "{lost} free pages, of which no store has a copy any more, came back as zeros: the guest does not use them"
        );
    }
    Ok(())
}

fn age(taken: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match now.saturating_sub(taken) {
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s if s < 172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// All snapshots.
pub fn list(common: &Common, stores: &Stores) -> Result<()> {
    let mut table = Table::new(&["name", "vm", "domain", "memory", "disk", "in stores", "age"], 3);
    let mut lines = Vec::new();
    let all = stores.all().len() + stores.lost().len();
    for (name, places) in stores.snapshots()? {
        let (has, of) = (places.len(), format!("{} of {all}", places.len()));
        let snapshot = match stores.load(&name) {
            Ok(snapshot) => snapshot,
            Err(e) => {
                lines.push(json!({"name": name, "stores": has, "error": e.to_string()}));
                table.row(vec![name, "broken".into(), "-".into(), "-".into(), "-".into(), of, "-".into()]);
                continue;
            }
        };
        let about = &snapshot.about;
        lines.push(json!({"name": name, "vm": about.vm, "domain": about.domain, "taken": about.taken, "stores": has,
            "memory_bytes": snapshot.memory_bytes(), "disk_bytes": snapshot.disk_bytes()}));
        table.row(vec![
            name,
            about.vm.clone(),
            about.domain.clone(),
            human_bytes(snapshot.memory_bytes()),
            human_bytes(snapshot.disk_bytes()),
            of,
            age(about.taken),
        ]);
    }
    let urls = stores.all().iter().map(|store| json!({"url": store.url(), "pack_bytes": store.pack_bytes()}));
    if common.json {
        let lost = stores.lost().iter().map(|e| e.to_string());
        return print_json(
            &json!({"snapshots": lines, "stores": urls.collect::<Vec<_>>(), "lost": lost.collect::<Vec<_>>()}),
        );
    }
    table.print();
    for store in stores.all() {
        println!("{}: {}", store.url(), human_bytes(store.pack_bytes()));
    }
    Ok(())
}

/// Where pages of a class are.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    pages: u64,
    zero: u64,
    base: u64,
    several: u64,
    once: u64,
}

impl Kept {
    fn add(&mut self, page: &Page, once: &HashSet<u32>) {
        self.pages += 1;
        *match page.held {
            Held::Zero => &mut self.zero,
            Held::Image { .. } => &mut self.base,
            Held::Pack { pack, .. } if once.contains(&pack) => &mut self.once,
            Held::Pack { .. } | Held::Elsewhere => &mut self.several,
        } += 1;
    }

    fn json(&self) -> Value {
        json!({"pages": self.pages, "zero": self.zero, "base": self.base, "several": self.several, "once": self.once})
    }
}

/// One snapshot.
pub fn show(common: &Common, stores: &Stores, snapshot: &Snapshot) -> Result<()> {
    let once = snapshot.once();
    let once: HashSet<u32> =
        (0..).zip(&snapshot.memory.packs).filter(|(_, id)| once.contains(id)).map(|(n, _)| n).collect();
    let mut classes = vec![Kept::default(); Class::ALL.len()];
    for (class, page) in snapshot.classes.iter().zip(&snapshot.memory.pages) {
        let place = Class::ALL.iter().position(|c| c == class).unwrap_or(0);
        if let Some(kept) = classes.get_mut(place) {
            kept.add(page, &once);
        }
    }
    let mut disk = Kept::default();
    snapshot.disks.iter().flat_map(|disk| &disk.data.pages).for_each(|page| disk.add(page, &once));
    let used: Vec<(&str, &Kept)> =
        Class::ALL.iter().map(|class| class.name()).zip(&classes).filter(|(_, kept)| kept.pages > 0).collect();
    let packs: Vec<Value> = snapshot.packs().iter().map(|id| pack(stores, snapshot, *id)).collect();
    if common.json {
        let table: serde_json::Map<String, Value> =
            used.iter().map(|(name, kept)| (name.to_string(), kept.json())).collect();
        return print_json(&json!({"about": snapshot.about, "memory_bytes": snapshot.memory_bytes(),
            "disk_bytes": snapshot.disk_bytes(), "pages": table, "disk": disk.json(), "packs": packs}));
    }
    let about = &snapshot.about;
    println!("snapshot {} of VM {}, domain {}, taken {} ago", about.name, about.vm, about.domain, age(about.taken));
    println!("kernel: {}; machine {}", kernel(&about.kernel), about.machine);
    for image in &about.images {
        println!("needs image {} ({}…)", image.name, image.digest.get(..12).unwrap_or_default());
    }
    println!();
    let most = used.iter().map(|(_, kept)| kept.pages).max().unwrap_or(1);
    let mut table = Table::new(&["pages", "", "all", "zero", "base image", "several", "once"], 2);
    for (name, kept) in &used {
        table.row(line(name, kept, most));
    }
    if disk.pages > 0 {
        table.row(line("disk", &disk, most));
    }
    table.print();
    print_map(&snapshot.classes);
    let bytes: u64 =
        stores.all().iter().flat_map(|s| snapshot.packs().into_iter().filter_map(|id| s.bytes_of(id))).sum();
    println!("{} packs, {} in {} stores", packs.len(), human_bytes(bytes), stores.all().len());
    Ok(())
}

fn pack(stores: &Stores, snapshot: &Snapshot, id: crate::store::PackId) -> Value {
    let has: Vec<&str> = stores.all().iter().filter(|store| store.has(id)).map(|store| store.url()).collect();
    let bytes = stores.all().iter().find_map(|store| store.bytes_of(id));
    json!({"id": hex(&id.0), "once": snapshot.once().contains(&id), "bytes": bytes, "stores": has})
}

fn line(name: &str, kept: &Kept, most: u64) -> Vec<String> {
    let bar = "█".repeat(usize::try_from((kept.pages * BAR).div_ceil(most.max(1))).unwrap_or(0));
    let numbers = [kept.pages, kept.zero, kept.base, kept.several, kept.once].map(|n| n.to_string());
    [name.to_string(), bar].into_iter().chain(numbers).collect()
}

/// Which class a part of memory mostly is, in the order of memory.
fn print_map(classes: &[Class]) {
    let part = classes.len().div_ceil(MAP * MAP_LINES).max(1);
    let letter = |class: Class| match class {
        Class::Zero => '.',
        Class::Free => '-',
        Class::CacheClean => 'c',
        Class::CacheDirty => 'd',
        Class::CacheNotUptodate => 'n',
        Class::Slab => 's',
        Class::PageTable => 't',
        Class::Anon => 'a',
        Class::Shmem => 'm',
        Class::Kernel => 'k',
        Class::Reserved => 'r',
        Class::Unknown => '?',
    };
    let most = |part: &[Class]| {
        let count = |class: &Class| part.iter().filter(|c| *c == class).count();
        Class::ALL.into_iter().max_by_key(count).unwrap_or(Class::Unknown)
    };
    let letters: Vec<char> = classes.chunks(part).map(|part| letter(most(part))).collect();
    println!("\nmemory, {} a letter:", human_bytes(part as u64 * 4096));
    for line in letters.chunks(MAP) {
        println!("  {}", line.iter().collect::<String>());
    }
    let legend = Class::ALL.map(|class| format!("{} {}", letter(class), class.name()));
    println!("  {}", legend.join(", "));
}

fn say(fault: &Fault) -> String {
    let short = |id: &crate::store::PackId| hex(&id.0).get(..12).unwrap_or_default().to_string();
    match fault {
        Fault::SnapshotMissing { name, store } => format!("{store}: has no snapshot {name}"),
        Fault::SnapshotBroken { name, store, why } => format!("{store}: snapshot {name}: {why}"),
        Fault::PackMissing { pack, store, left } => {
            format!("{store}: has no pack {}…, which {left} other stores have", short(pack))
        }
        Fault::PackBroken { pack, store, why, left } => {
            format!("{store}: pack {}… is broken, and whole in {left} other stores: {why}", short(pack))
        }
        Fault::PackGone { pack } => {
            format!(
                "pack {}… of free pages is whole in no store: they come back as zeros, and no guest misses them",
                short(pack)
            )
        }
    }
}

/// After a check or repair.
///
/// # Errors
/// Something is wrong that matters.
pub fn findings(common: &Common, stores: &Stores, found: &Findings, freed: Option<u64>) -> Result<()> {
    let wrong: Vec<String> = found.faults.iter().map(say).collect();
    let mended: Vec<String> = found.mended.iter().map(say).collect();
    let lost: Vec<String> = stores.lost().iter().map(|e| e.to_string()).collect();
    let harmless = found.harmless();
    if common.json {
        print_json(&json!({"snapshots": found.snapshots, "packs": found.packs, "bytes": found.bytes, "faults": wrong,
            "mended": mended, "broken": found.broken, "lost_stores": lost, "freed_bytes": freed}))?;
    } else {
        wrong.iter().for_each(|line| println!("{line}"));
        mended.iter().for_each(|line| println!("mended: {line}"));
        lost.iter().for_each(|line| println!("store left out: {line}"));
        println!(
            "{} snapshots, {} packs, {} read: {} faults, {} mended",
            found.snapshots,
            found.packs,
            human_bytes(found.bytes),
            wrong.len(),
            mended.len()
        );
    }
    if !found.broken.is_empty() {
        let cause = format!("cannot be restored from these stores: {}", found.broken.join(", "));
        return Err(Error::new(ErrorKind::Corrupt, "snapshots", cause).mend("name more stores that they were saved to"));
    }
    if !lost.is_empty() {
        let cause = format!("{} of {} could not be looked at", lost.len(), lost.len() + stores.all().len());
        return Err(Error::new(ErrorKind::NotFound, "stores", cause).mend(
            "all can be restored without; bring it back, or let 'vmar snapshot repair' fill an empty one in its place",
        ));
    }
    if wrong.len() > harmless {
        return Err(Error::new(ErrorKind::Corrupt, "snapshots", format!("{} faults", wrong.len() - harmless))
            .mend("all can be restored; 'vmar snapshot repair' mends the copies"));
    }
    Ok(())
}
