//! Makes what a library knows anew: everything of the images, or the content index of the fingerprints.

use super::Work;
use super::add::{Added, enter, refingerprint};
use super::change::Change;
use super::contents::Contents;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Algorithm;
use crate::library::domain::{Key, KeyRef};
use crate::library::{Catalog, Writer};
use std::collections::BTreeMap;

/// Makes the content indexes anew, of the fingerprints.
///
/// # Errors
/// `Corrupt` when the fingerprints of an image are damaged: then all is to be made anew.
pub fn rebuild_index(writer: &mut Writer, work: &Work) -> Result<()> {
    let mut change = Change::begin(writer);
    for domain in domains(&change) {
        let contents = Contents::derived(&change.transaction, &domain, work)?;
        change.renew(&domain, contents);
    }
    change.commit(|_| {}, work)
}

/// Makes fingerprints, indexes and maps anew, of the images alone; names, IDs and policy stay. The images must hold what was
/// added: one that changed is to be updated or removed first, or else the fingerprints of its old content are lost. With
/// `new_keys` the sharing domains get other keys, for when one was lost or somebody else has learnt it.
///
/// # Errors
/// `Changed` when an image does not have its content digest any more; `NotFound` when one is gone. Nothing has changed then.
pub fn rebuild(writer: &mut Writer, new_keys: bool, work: &Work) -> Result<Vec<Added>> {
    if new_keys && writer.library().catalog().fingerprint == Algorithm::Sha1 {
        return Err(Error::new(ErrorKind::Usage, "--new-keys", "the fingerprints of this library have no keys")
            .mend("leave it out, or make a library with '--fingerprint blake3'"));
    }
    let mut change = Change::begin(writer);
    let mut records = change.transaction.library().images().to_vec();
    records.iter().for_each(|r| change.images.remove(r.id.0));
    let mut keys: BTreeMap<String, KeyRef> = BTreeMap::new();
    for domain in domains(&change) {
        let contents = Contents::empty(&change.transaction, &domain);
        change.renew(&domain, contents);
        if new_keys {
            let (key, reference) = Key::stage(&mut change.transaction, &domain)?;
            change.rekey(&domain, key.hasher());
            keys.insert(domain, reference);
        }
    }
    // The public images first: others look for their contents there.
    let public = change.transaction.library().catalog().public_domain().map(str::to_string);
    records.sort_by_key(|r| (Some(&r.domain) != public.as_ref(), r.id));
    let mut out = Vec::with_capacity(records.len());
    for record in &records {
        work.check_stop(&record.name)?;
        let found = refingerprint(&change, record, work)?;
        if found.side.record.digest != record.digest {
            let cause = format!("image {} is not what was added", record.name);
            return Err(Error::file(ErrorKind::Changed, &found.side.path, cause)
                .mend(format!("put the original back, or 'vmar image remove {}' (or update) first", record.name)));
        }
        out.push(enter(&mut change, found, work)?);
    }
    let with_keys = |catalog: &mut Catalog| {
        for (name, key) in keys {
            if let Some(domain) = catalog.domains.get_mut(&name) {
                domain.key = Some(key);
            }
        }
    };
    change.commit(with_keys, work)?;
    out.sort_by_key(|added| added.record.id);
    Ok(out)
}

fn domains(change: &Change<'_>) -> Vec<String> {
    change.transaction.library().catalog().domains.keys().cloned().collect()
}
