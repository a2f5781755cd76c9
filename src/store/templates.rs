//! Templates in a store: packs of pages that many VMs hold, by sharing domain.
//!
//! ```text
//! DIR/templates/DOMAIN/N-ID.pack      version N of the domain's template; its ID says what it holds
//! ```
//!
//! A template is a file like any other: copied to another host it is the same there, by its ID, whatever version it is there.

use super::dir::{Store, StoreWriter, check_file_name};
use super::pack::{Pack, PackId};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::sync_dir;
use std::fs;
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

const TEMPLATES: &str = "templates";

/// A template's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateFile {
    /// Sharing domain of the VMs that it is for.
    pub domain: String,
    /// Counts the domain's templates in this store.
    pub version: u64,
    /// What it holds.
    pub id: PackId,
    /// Where it is.
    pub path: PathBuf,
}

impl TemplateFile {
    /// Opens it.
    ///
    /// # Errors
    /// See [`Pack::open`].
    pub fn open(&self) -> Result<Pack> {
        Pack::open(&self.path, self.id)
    }
}

/// Version and ID in a template's file name; also of one that was copied from elsewhere.
pub fn parse_name(path: &Path) -> Option<(u64, PackId)> {
    let (version, id) = path.file_name()?.to_str()?.strip_suffix(".pack")?.split_once('-')?;
    Some((version.parse().ok()?, PackId(crate::codec::unhex(id)?)))
}

impl Store {
    /// The templates of a domain, or of all; of each domain the newest first.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn templates(&self, domain: Option<&str>) -> Result<Vec<TemplateFile>> {
        let home = self.dir().join(TEMPLATES);
        let domains = match domain {
            Some(domain) => vec![check_file_name(domain)?.to_string()],
            None => names(&home)?,
        };
        let mut out = Vec::new();
        for domain in domains {
            let dir = home.join(&domain);
            for name in names(&dir)? {
                let path = dir.join(name);
                if let Some((version, id)) = parse_name(&path) {
                    out.push(TemplateFile { domain: domain.clone(), version, id, path });
                }
            }
        }
        out.sort_by(|a, b| (&a.domain, b.version).cmp(&(&b.domain, a.version)));
        Ok(out)
    }
}

impl StoreWriter {
    /// Makes a pack that lies in [`Store::staging`], and is durable, the newest template of a domain. One that the domain has
    /// already stays what it is.
    ///
    /// # Errors
    /// It cannot be moved there.
    pub fn add_template(&mut self, domain: &str, staged: &Path, id: PackId) -> Result<TemplateFile> {
        let all = self.store().templates(Some(domain))?;
        if let Some(same) = all.iter().find(|t| t.id == id) {
            fs::remove_file(staged).map_err(|e| Error::io(staged, "remove it", e))?;
            return Ok(same.clone());
        }
        let home = self.store().dir().join(TEMPLATES);
        let dir = home.join(domain);
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, "make it", e))?;
        let version = all.first().map_or(1, |newest| newest.version + 1);
        let path = dir.join(format!("{version}-{}", id.file_name()));
        fs::rename(staged, &path).map_err(|e| Error::io(staged, &format!("move it to {}", path.display()), e))?;
        for dir in [&dir, &home, self.store().dir()] {
            sync_dir(dir)?;
        }
        Ok(TemplateFile { domain: domain.into(), version, id, path })
    }

    /// Removes a template.
    ///
    /// # Errors
    /// `NotFound`, or it cannot be removed.
    pub fn remove_template(&mut self, domain: &str, version: u64) -> Result<()> {
        let all = self.store().templates(Some(domain))?;
        let Some(one) = all.iter().find(|t| t.version == version) else {
            let what = format!("domain {domain} has no template {version}");
            return Err(Error::file(ErrorKind::NotFound, self.store().dir(), what).mend("see 'vmar template list'"));
        };
        fs::remove_file(&one.path).map_err(|e| Error::io(&one.path, "remove it", e))
    }
}

/// Names in a directory; none if there is no such directory.
fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = |e| Error::io(dir, "look at it", e);
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == IoKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()).map_err(failed)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{PAGE_BYTES, PackWriter};
    use super::*;

    fn staged(writer: &StoreWriter, byte: u8) -> (PathBuf, PackId) {
        let path = writer.store().staging().join("new.pack");
        let mut pack = PackWriter::create(&path).unwrap();
        let page = [byte; PAGE_BYTES];
        pack.push(blake3::hash(&page).as_bytes(), &page).unwrap();
        (path, pack.finish().unwrap())
    }

    #[test]
    fn versions_of_a_domain_count_up_and_the_same_is_not_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Store::create(dir.path()).unwrap().writer().unwrap();
        assert_eq!(writer.store().templates(None).unwrap(), []);
        let mut add = |domain: &str, byte| {
            let (path, id) = staged(&writer, byte);
            writer.add_template(domain, &path, id).unwrap()
        };
        let (one, two) = (add("shop", 1), add("shop", 2));
        assert_eq!((one.version, two.version, add("bank", 1).version), (1, 2, 1));
        assert_eq!(add("shop", 1), one);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.templates(Some("shop")).unwrap(), [two.clone(), one.clone()]);
        assert_eq!(store.templates(None).unwrap().len(), 3);
        let mut page = [0; PAGE_BYTES];
        two.open().unwrap().read(0, &mut page).unwrap();
        assert_eq!(page, [2; PAGE_BYTES]);
        writer.remove_template("shop", 2).unwrap();
        assert_eq!(writer.remove_template("shop", 2).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.templates(Some("shop")).unwrap(), [one]);
        assert_eq!(store.templates(Some("../shop")).unwrap_err().kind(), ErrorKind::Usage);
    }

    /// What a kill leaves is cleared; templates are no packs of images, and stay.
    #[test]
    fn a_writer_that_clears_up_leaves_templates() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Store::create(dir.path()).unwrap().writer().unwrap();
        let (path, id) = staged(&writer, 1);
        let made = writer.add_template("shop", &path, id).unwrap();
        drop(writer);
        let writer = Store::open(dir.path()).unwrap().writer().unwrap();
        assert_eq!(writer.store().templates(None).unwrap(), [made]);
    }
}
