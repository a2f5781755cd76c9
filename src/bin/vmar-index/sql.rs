//! The statements, as `docs/index-sql.md` has them, and `vmar-index query`.

use super::session::Engine;
use super::{engine_error, say, tables};
use vmar::Result;
use vmar::library::Library;

/// The rows of the run of image 0; the table `blocks` is all of them.
pub const RUN: &str = include_str!("sql/run.sql");

/// Where each block of each image is canonically.
pub const HOMES: &str = include_str!("sql/homes.sql");

/// By name.
pub const STATEMENTS: &[(&str, &str)] = &[
    ("homes", HOMES),
    ("clusters", include_str!("sql/clusters.sql")),
    ("shared", include_str!("sql/shared.sql")),
    ("similarity", include_str!("sql/similarity.sql")),
];

/// Prints the answer as a table, for each sharing domain one.
pub async fn query(library: &Library, engine: &Engine, statement: &str, explain: bool) -> Result<()> {
    let text = STATEMENTS.iter().find(|(name, _)| *name == statement).map_or(statement, |(_, text)| text);
    for images in tables::domains(library) {
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
