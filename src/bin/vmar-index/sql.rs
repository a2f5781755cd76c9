//! The statements, as `docs/index-sql.md` has them, and `vmar-index query`.

use super::session::Engine;
use super::{engine_error, say, tables};
use vmar::Result;
use vmar::indexer::offline::in_order;
use vmar::library::Library;

/// The rows of the run of image 0; the table `blocks` is all of them.
pub const RUN: &str = include_str!("sql/run.sql");

/// Where each block of each image is canonically, in the order of the policy.
pub const HOMES: &str = include_str!("sql/homes.sql");

/// How many blocks of each image others could read, and in how many runs they lie.
pub const FRAGMENTS: &str = include_str!("sql/fragments.sql");

/// By name.
pub const STATEMENTS: &[(&str, &str)] = &[
    ("homes", HOMES),
    ("clusters", include_str!("sql/clusters.sql")),
    ("shared", include_str!("sql/shared.sql")),
    ("fragments", FRAGMENTS),
    ("similarity", include_str!("sql/similarity.sql")),
];

/// Prints the answer as a table, for each sharing domain one.
pub async fn query(library: &Library, engine: &Engine, statement: &str, explain: bool) -> Result<()> {
    let text = STATEMENTS.iter().find(|(name, _)| *name == statement).map_or(statement, |(_, text)| text);
    let catalog = library.catalog();
    for images in tables::domains(library) {
        tables::check(library, &images)?;
        let images = in_order(images, catalog.policy, &catalog.preference);
        let ctx = engine.session().await?;
        tables::register(&ctx, library, &images).await?;
        let answer = async {
            let frame = ctx.sql(text).await?;
            let frame = if explain { frame.explain(false, false)? } else { frame };
            frame.to_string().await
        };
        say(answer.await.map_err(|e| engine_error(engine.name(), e))?)?;
    }
    Ok(())
}
