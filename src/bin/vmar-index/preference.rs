//! Which images the policy prefers, as `vmar library remap` with this policy would.

use super::homes::{numbers, wrong};
use super::session::Engine;
use super::sql::FRAGMENTS;
use super::{engine_error, tables};
use std::collections::BTreeMap;
use vmar::indexer::offline::mean_length;
use vmar::library::{ImageRecord, Library, Policy};
use vmar::{Error, ErrorKind, Result};

/// By ID; for [`vmar::indexer::offline::in_order`].
///
/// # Errors
/// `Usage` for `most-used` in a library that does not know what is used: only `vmar library remap` reads traces.
pub async fn preference(
    library: &Library,
    engine: &Engine,
    policy: Policy,
    images: &[&ImageRecord],
) -> Result<BTreeMap<u32, u64>> {
    match policy {
        Policy::Paper | Policy::Bridge(_) => Ok(BTreeMap::new()),
        Policy::MostUsed(_) if matches!(library.catalog().policy, Policy::MostUsed(_)) => {
            Ok(library.catalog().preference.clone())
        }
        Policy::MostUsed(_) => {
            Err(Error::new(ErrorKind::Usage, "policy most-used", "the library does not know which images are used")
                .mend("tell it first: 'vmar library remap --policy most-used --traces FILE ...'"))
        }
        Policy::LeastFragmented(_) => {
            let lengths = mean_lengths(library, engine, images).await?;
            // Unlike canonical addresses they cannot be checked, and an executor that dies can spoil them.
            if engine.cluster.is_some() && mean_lengths(library, engine, images).await? != lengths {
                return Err(wrong("the lengths of runs are others when asked again"));
            }
            Ok(lengths)
        }
    }
}

/// Asks the engine anew: what the catalog has is from the last remap, and images have come since.
async fn mean_lengths(library: &Library, engine: &Engine, images: &[&ImageRecord]) -> Result<BTreeMap<u32, u64>> {
    let ctx = engine.session().await?;
    tables::register(&ctx, library, images).await?;
    let answer = async { ctx.sql(FRAGMENTS).await?.collect().await };
    let mut out = BTreeMap::new();
    for batch in answer.await.map_err(|e| engine_error(engine.name(), e))? {
        let [image, blocks, runs] = numbers(&batch)?;
        for i in 0..batch.num_rows() {
            let id = u32::try_from(image.value(i)).unwrap_or(u32::MAX);
            out.insert(id, mean_length(blocks.value(i).unsigned_abs(), runs.value(i).unsigned_abs()));
        }
    }
    Ok(out)
}
