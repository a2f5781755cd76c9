//! Who answers the SQL: DataFusion in this process, or the executors of a Ballista cluster. Nothing else differs.

use super::{engine_error, parse_size};
use ballista::prelude::{SessionConfigExt, SessionContextExt};
use ballista_core::config::BALLISTA_ADAPTIVE_PLANNER_ENABLED;
use datafusion::execution::SessionStateBuilder;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::prelude::{SessionConfig, SessionContext};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmar::Result;
use vmar::units::to_usize;

/// Partitions of a cluster's stages, unless told: pieces that are small enough to be done again when an executor dies.
const CLUSTER_PARTITIONS: usize = 16;

/// Which engine, and what it may use.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Engine {
    /// Ask a cluster instead of this process
    #[arg(long, value_name = "df://HOST:PORT", conflicts_with_all = ["memory", "spill"])]
    pub cluster: Option<String>,
    /// Memory of the engine; what does not fit is spilled (default: no limit). The process itself takes some more
    #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Where spilled data goes (default: the directory for temporary files)
    #[arg(long, value_name = "DIR")]
    pub spill: Option<PathBuf>,
    /// Pieces that the work is cut into (default: one a core; on a cluster 16)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub partitions: Option<u16>,
}

impl Engine {
    /// A new session, without tables.
    pub async fn session(&self) -> Result<SessionContext> {
        match &self.cluster {
            None => self.embedded(),
            Some(url) => self.remote(url).await,
        }
    }

    /// What an error of the engine is about.
    pub fn name(&self) -> &str {
        self.cluster.as_deref().unwrap_or("DataFusion")
    }

    fn embedded(&self) -> Result<SessionContext> {
        let mut config = SessionConfig::new().with_information_schema(true);
        // A hash join cannot spill, a merge join can.
        config.options_mut().optimizer.prefer_hash_join = self.memory.is_none();
        if let Some(n) = self.partitions {
            config = config.with_target_partitions(n.into());
        }
        let spill = self.spill.clone().unwrap_or_else(std::env::temp_dir);
        let runtime = runtime(&spill, self.memory).map_err(|e| engine_error(&spill.to_string_lossy(), e))?;
        Ok(SessionContext::new_with_config_rt(config, runtime))
    }

    async fn remote(&self, url: &str) -> Result<SessionContext> {
        let partitions = self.partitions.map_or(CLUSTER_PARTITIONS, usize::from);
        let mut config =
            SessionConfig::new_with_ballista().with_target_partitions(partitions).with_ballista_job_name("vmar-index");
        // The planner that changes plans underway forgets a stage that has to be done again because an executor died after
        // it, and the job stands still. There is nothing to adapt to: the size of everything is known.
        config = config.set_bool(BALLISTA_ADAPTIVE_PLANNER_ENABLED, false);
        // As above: the memory of an executor has always an end.
        config.options_mut().optimizer.prefer_hash_join = false;
        let state = SessionStateBuilder::new().with_config(config).with_default_features().build();
        SessionContext::remote_with_state(url, state).await.map_err(|e| engine_error(url, e))
    }
}

/// Memory and disk of an engine: spilled data goes to `spill`, as much as that file system takes.
pub fn runtime(spill: &Path, memory: Option<u64>) -> datafusion::error::Result<Arc<RuntimeEnv>> {
    let disk = DiskManagerBuilder::default()
        .with_mode(DiskManagerMode::Directories(vec![spill.to_path_buf()]))
        .with_max_temp_directory_size(u64::MAX);
    let builder = RuntimeEnvBuilder::new().with_disk_manager_builder(disk);
    match memory {
        // Each of the operators that can spill gets its share, so that none of them starves.
        Some(bytes) => builder.with_memory_pool(Arc::new(FairSpillPool::new(to_usize(bytes)))).build_arc(),
        None => builder.build_arc(),
    }
}
