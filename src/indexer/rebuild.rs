//! Makes what a library knows anew: everything of the images, or the content index of the fingerprints.

use super::Work;
use super::add::{Added, enter, refingerprint};
use super::change::Change;
use super::contents::Contents;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Writer;

/// Makes the content index anew, of the fingerprints.
///
/// # Errors
/// `Corrupt` when the fingerprints of an image are damaged: then all is to be made anew.
pub fn rebuild_index(writer: &mut Writer, work: &Work) -> Result<()> {
    let transaction = writer.begin();
    let domain = transaction.library().catalog().domain.clone();
    let contents = Contents::derived(&transaction, &domain, work)?;
    Change::with(transaction, contents, &domain).commit(|_| {}, work)
}

/// Makes fingerprints, index and maps anew, of the images alone; names, IDs and policy stay. The images must hold what was
/// added: one that changed is to be updated or removed first, or else the fingerprints of its old content are lost.
///
/// # Errors
/// `Changed` when an image does not have its content digest any more; `NotFound` when one is gone. Nothing has changed then.
pub fn rebuild(writer: &mut Writer, work: &Work) -> Result<Vec<Added>> {
    let transaction = writer.begin();
    let records = transaction.library().images().to_vec();
    let domain = transaction.library().catalog().domain.clone();
    let contents = Contents::empty(&transaction, &domain);
    let mut change = Change::with(transaction, contents, &domain);
    records.iter().for_each(|r| change.images.remove(r.id.0));
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
    change.commit(|_| {}, work)?;
    Ok(out)
}
