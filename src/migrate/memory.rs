//! What a host remembers of the VMs that came and went, for the migrations to come: the store beside a migration.
//!
//! | | who has it | what |
//! | --- | --- | --- |
//! | kept | the host that a VM left | its memory, with pages |
//! | gone | the host that it came to | the hashes of the same, to leave out what the other one keeps |
//! | templates | both | pages that many VMs of a sharing domain hold |
//!
//! None of it is needed: whatever is missing, broken or of another migration costs bytes on the link, and never the migration.

use super::bases::BaseFiles;
use super::kept::{Hashes, Kept, Remembered, Spool, Stay};
use super::wire::{Digest, TEMPLATES_MAX};
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::store::dir::Kind;
use crate::store::templates::TemplateFile;
use crate::store::{Manifest, Pack, PackId, Store, StoreWriter};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long another migration may write its VM's memory before this one's is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A store, and how much it may hold.
#[derive(Debug)]
pub struct Memory {
    store: Store,
    budget: u64,
}

impl Memory {
    /// Opens the store, or makes it; `budget` is bytes of images and packs.
    ///
    /// # Errors
    /// See [`Store::create`].
    pub fn open(dir: &Path, budget: u64) -> Result<Memory> {
        Ok(Memory { store: Store::create(dir)?, budget })
    }

    /// Where a VM that leaves can be spooled.
    pub fn spool_dir(&self) -> PathBuf {
        self.store.staging()
    }

    /// At the sender: what the host that a VM came from keeps of it.
    pub fn remembered(&self, vm: &str) -> Option<Remembered> {
        let image = self.image(Kind::Gone, vm)?;
        Some(Remembered::new(Hashes::of(image)))
    }

    /// At the sender: the templates of a domain, the newest first, as many as a greeting may name.
    pub fn templates(&self, domain: &str) -> Vec<TemplateFile> {
        let found = self.store.templates(Some(domain)).unwrap_or_else(|e| {
            log::warn!("templates are not used: {e}");
            Vec::new()
        });
        found.into_iter().take(TEMPLATES_MAX).collect()
    }

    /// At the receiver: the memory that a VM had when it left, if it is the one of this root, and all of it is still here.
    pub fn kept(&self, vm: &str, root: &Digest, library: Option<&Library>) -> Option<Kept> {
        let manifest = self.image(Kind::Kept, vm)?;
        if manifest.root() != *root {
            log::info!("the kept memory of VM {vm} is not that of its last stay");
            return None;
        }
        let images = library.map_or_else(BaseFiles::none, |library| BaseFiles::open(library, &manifest.images));
        let used = manifest.images_used();
        if !used.iter().all(|n| images.has(*n)) {
            log::warn!("the kept memory of VM {vm} is not used: an image that it refers to is not in the library here");
            return None;
        }
        let packs = self.store.packs(&manifest).inspect_err(|e| log::warn!("kept memory of VM {vm}: {e}")).ok()?;
        Some(Kept::new(manifest, packs, images))
    }

    /// At the receiver: the first of these templates that is here, and which it is.
    pub fn template(&self, ids: &[Digest]) -> Option<(usize, Pack)> {
        let all = self.store.templates(None).inspect_err(|e| log::warn!("templates are not used: {e}")).ok()?;
        ids.iter().enumerate().find_map(|(n, id)| {
            let file = all.iter().find(|t| t.id == PackId(*id))?;
            Some((n, file.open().inspect_err(|e| log::warn!("a template is not used: {e}")).ok()?))
        })
    }

    /// At the sender, when the VM has left: its memory in place of what was kept of an earlier stay. The VMs that had to make room.
    ///
    /// # Errors
    /// It cannot be written; then what was kept is as it was.
    pub fn keep(&self, spool: Spool, stay: Stay<'_>) -> Result<Vec<String>> {
        let mut writer = self.writer()?;
        let vm = stay.vm.to_string();
        let pack = writer.store().staging().join("kept.pack");
        let (manifest, id) = spool.seal(stay, &pack)?;
        writer.publish(Kind::Kept, &manifest, &[(pack, id)])?;
        // It is of no use where the VM is not.
        writer.remove(Kind::Gone, &vm)?;
        writer.evict(self.budget)
    }

    /// At the receiver, when the VM has come: what the host that it left keeps of it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn note(&self, vm: &str, hashes: Hashes, taken: u64) -> Result<()> {
        let mut writer = self.writer()?;
        writer.publish(Kind::Gone, &hashes.elsewhere(vm, taken), &[])?;
        writer.evict(self.budget).map(|_| ())
    }

    fn writer(&self) -> Result<StoreWriter> {
        Store::writer_within(self.store.dir(), PATIENCE)
    }

    fn image(&self, kind: Kind, vm: &str) -> Option<Manifest> {
        self.store.image(kind, vm).unwrap_or_else(|e| {
            log::warn!("memory of VM {vm} is not used: {e}");
            None
        })
    }
}

/// Makes a template of the memory of VMs of a domain that left this host: the pages that at least `share` of them hold.
///
/// # Errors
/// Fewer VMs than that are kept, an image of theirs is broken, or the store cannot be written.
pub fn build_template(
    writer: &mut StoreWriter,
    domain: &str,
    share: usize,
    most: usize,
) -> Result<(TemplateFile, usize)> {
    let mut manifests = Vec::new();
    for entry in writer.store().entries(Kind::Kept)? {
        manifests.extend(writer.store().image(Kind::Kept, &entry.vm)?.filter(|m| m.domain == domain));
    }
    if manifests.len() < share {
        let cause = format!("{} VMs of domain {domain} are kept, and {share} are to share a page", manifests.len());
        return Err(Error::file(ErrorKind::NotFound, writer.store().dir(), cause)
            .mend("migrate VMs away with --store first, or ask for a smaller --share"));
    }
    let pages = super::template::choose(&manifests, share, most);
    let open = |m: Manifest| Ok(Kept::new(m.clone(), writer.store().packs(&m)?, BaseFiles::none()));
    let images = manifests.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    let path = writer.store().staging().join("template.pack");
    let id = super::template::build(&path, &images, &pages)?;
    Ok((writer.add_template(domain, &path, id)?, pages.len()))
}

/// Puts a template that was made on another host into a store; `file` has the name that it had there.
///
/// # Errors
/// It has another name, or is not what its name says.
pub fn import_template(writer: &mut StoreWriter, domain: &str, file: &Path) -> Result<TemplateFile> {
    let Some((_, id)) = crate::store::templates::parse_name(file) else {
        return Err(Error::file(ErrorKind::Usage, file, "is no template: they are called N-ID.pack")
            .mend("copy it with the name that it has in the other store ('vmar template list')"));
    };
    Pack::open(file, id)?.verify()?;
    let staged = writer.store().staging().join("template.pack");
    let copied = std::fs::copy(file, &staged).and_then(|_| std::fs::File::open(&staged)?.sync_all());
    copied.map_err(|e| Error::io(file, &format!("copy it to {}", staged.display()), e))?;
    writer.add_template(domain, &staged, id)
}
