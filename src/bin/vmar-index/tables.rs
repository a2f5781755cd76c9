//! What the statements see of a library: `blocks` (image, rank, hash, variant, block) and `images` (image, name, blocks).

use super::engine_error;
use super::sql::RUN;
use datafusion::catalog::view::ViewTable;
use datafusion::common::DataFusionError;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder, Union, lit};
use datafusion::prelude::SessionContext;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use vmar::fingerprint::run;
use vmar::library::{ImageRecord, Library};
use vmar::{Error, ErrorKind, Result};

/// The images of each sharing domain. A statement sees one of them at a time: blocks are only shared inside one, and
/// fingerprints of different domains do not compare.
pub fn domains(library: &Library) -> Vec<Vec<&ImageRecord>> {
    let mut out: Vec<Vec<&ImageRecord>> = Vec::new();
    for record in library.images() {
        match out.iter_mut().find(|images| images.iter().any(|r| r.domain == record.domain)) {
            Some(domain) => domain.push(record),
            None => out.push(vec![record]),
        }
    }
    out
}

/// Refuses runs that are not those that the catalog names: the engine would not notice.
pub fn check(library: &Library, images: &[&ImageRecord]) -> Result<()> {
    images.iter().try_for_each(|record| check_run(library, record))
}

/// Makes `blocks` and `images` of these images, of which there is at least one, in the order of the policy. Their runs
/// passed [`check`].
pub async fn register(ctx: &SessionContext, library: &Library, images: &[&ImageRecord]) -> Result<()> {
    let mut inputs = Vec::with_capacity(images.len());
    for (rank, record) in images.iter().enumerate() {
        let path = library.run_path(record);
        let plan = rows_of(ctx, record, rank, &path).await.map_err(|e| engine_error(&path.to_string_lossy(), e))?;
        inputs.push(Arc::new(plan));
    }
    register_views(ctx, images, inputs).map_err(|e| engine_error("tables", e))
}

/// Size, checksum, schema and number of rows, all of them before the engine starts.
fn check_run(library: &Library, record: &ImageRecord) -> Result<()> {
    let path = library.run_path(record);
    let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
    let rows = run::Reader::open(&path, stamp)?.rows();
    if rows != record.nonzero_blocks {
        let cause = format!("has {rows} fingerprints, image {} {} blocks", record.name, record.nonzero_blocks);
        return Err(
            Error::file(ErrorKind::Corrupt, path, cause).mend("restore it from a backup, or build the library anew")
        );
    }
    Ok(())
}

/// The rows of one run with the ID and the rank of their image.
async fn rows_of(
    ctx: &SessionContext,
    record: &ImageRecord,
    rank: usize,
    path: &Path,
) -> Result<LogicalPlan, DataFusionError> {
    let options = ListingOptions::new(Arc::new(ParquetFormat::default())).with_file_extension("");
    let config = ListingTableConfig::new(ListingTableUrl::parse(url_of(path)?)?)
        .with_listing_options(options)
        .infer_schema(&ctx.state())
        .await?;
    let id = record.id.to_string();
    ctx.register_table(format!("run_{id}"), Arc::new(ListingTable::try_new(config)?))?;
    let text = RUN
        .replace("run_0", &format!("run_{id}"))
        .replace("CAST(0 AS BIGINT) AS image", &format!("CAST({id} AS BIGINT) AS image"))
        .replace("CAST(0 AS BIGINT) AS rank", &format!("CAST({rank} AS BIGINT) AS rank"));
    ctx.state().create_logical_plan(&text).await
}

/// The `UNION ALL` is made flat: as text it would nest as deep as there are images, which neither the parser nor the
/// wire format of plans takes.
fn register_views(
    ctx: &SessionContext,
    images: &[&ImageRecord],
    mut inputs: Vec<Arc<LogicalPlan>>,
) -> Result<(), DataFusionError> {
    let blocks = match inputs.len() {
        1 => inputs.remove(0).as_ref().clone(),
        _ => LogicalPlan::Union(Union::try_new(inputs)?),
    };
    let row = |r: &&ImageRecord| vec![lit(i64::from(r.id.0)), lit(r.name.clone()), lit(r.blocks.cast_signed())];
    let values = LogicalPlanBuilder::values(images.iter().map(row).collect())?;
    let names = ["image", "name", "blocks"]
        .iter()
        .zip(1..)
        .map(|(name, n)| datafusion::prelude::col(format!("column{n}")).alias(*name));
    let images = values.project(names)?.build()?;
    ctx.register_table("blocks", Arc::new(ViewTable::new(blocks, None)))?;
    ctx.register_table("images", Arc::new(ViewTable::new(images, None)))?;
    Ok(())
}

/// As an URL, for as a path it would be a pattern.
fn url_of(path: &Path) -> std::io::Result<String> {
    let mut out = String::from("file://");
    for byte in std::path::absolute(path)?.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => out.push(char::from(*byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_no_pattern() {
        assert_eq!(url_of(Path::new("/a b/[x]*%.1")).unwrap(), "file:///a%20b/%5Bx%5D%2A%25.1");
    }
}
