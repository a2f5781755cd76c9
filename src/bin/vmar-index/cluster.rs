//! The processes of a cluster: one scheduler, and executors as many as there are machines. Ballista, as it is.
//!
//! Executors read the runs themselves, so the library must be at the same path on all of them. Neither process asks who
//! is there: bind them to a network that only the cluster is on.

use super::session::runtime;
use super::{engine_error, parse_size};
use ballista_core::config::TaskSchedulingPolicy;
use ballista_executor::executor_process::{ExecutorProcessConfig, start_executor_process};
use ballista_scheduler::cluster::BallistaCluster;
use ballista_scheduler::config::SchedulerConfig;
use ballista_scheduler::scheduler_process::start_server;
use datafusion::prelude::SessionConfig;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use vmar::{Error, ErrorKind, Result};

/// Executors ask for tasks, as many as they have room for. If the scheduler sends them instead, which is the default, it
/// keeps count of their room itself and loses count when it takes a stage back because another executor died: with every
/// death it thinks somebody else busy for ever, and at last everybody, and the job stands still.
const SCHEDULING: TaskSchedulingPolicy = TaskSchedulingPolicy::PullStaged;

/// `vmar-index scheduler`.
#[derive(Debug, clap::Args)]
pub struct Scheduler {
    /// Address to listen on
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:50050")]
    bind: SocketAddr,
    /// Name or address by which executors find this machine (default: the one of --bind)
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// An executor that was not heard of for so long is dead, and its work is given to others. A busy one says every 5
    /// seconds that it is alive
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(10..))]
    executor_timeout: u64,
}

impl Scheduler {
    /// Runs until it is killed.
    pub async fn run(self) -> Result<()> {
        if self.host.is_none() && self.bind.ip().is_unspecified() {
            return Err(Error::new(ErrorKind::Usage, format!("--bind {}", self.bind), "is no address to answer to")
                .mend("give --host NAME too, the name of this machine"));
        }
        let config = SchedulerConfig {
            bind_host: self.bind.ip().to_string(),
            bind_port: self.bind.port(),
            external_host: self.host.unwrap_or_else(|| self.bind.ip().to_string()),
            executor_timeout_seconds: self.executor_timeout,
            expire_dead_executor_interval_seconds: (self.executor_timeout / 4).max(1),
            no_executors_grace_period_seconds: self.executor_timeout,
            scheduling_policy: SCHEDULING,
            ..SchedulerConfig::default()
        };
        let subject = format!("scheduler {}", self.bind);
        let cluster = BallistaCluster::new_from_config(&config).await.map_err(|e| engine_error(&subject, e))?;
        start_server(cluster, self.bind, Arc::new(config)).await.map_err(|e| engine_error(&subject, e))
    }
}

/// `vmar-index executor`.
#[derive(Debug, clap::Args)]
pub struct Executor {
    /// The scheduler
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50050")]
    scheduler: String,
    /// Address to hand out results on
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:50051")]
    bind: SocketAddr,
    /// Name or address by which others find this machine (default: the one that they see)
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Where stages keep their results, and where spilled data goes; must be there
    #[arg(long, value_name = "DIR")]
    work_dir: PathBuf,
    /// Memory of all tasks together; what does not fit is spilled (default: 70 % of the machine's)
    #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
    memory: Option<u64>,
    /// Tasks at a time (default: one a core)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    tasks: Option<u16>,
}

impl Executor {
    /// Runs until it is told to end (Ctrl-C, SIGTERM); then it finishes its tasks first.
    pub async fn run(self) -> Result<()> {
        let usage = |cause: &str| Error::new(ErrorKind::Usage, format!("--scheduler {}", self.scheduler), cause);
        let Some((host, port)) = self.scheduler.rsplit_once(':').and_then(|(h, p)| Some((h, p.parse().ok()?))) else {
            return Err(usage("is not HOST:PORT").mend("give both, as in 127.0.0.1:50050"));
        };
        if !self.work_dir.is_dir() {
            return Err(Error::file(ErrorKind::NotFound, &self.work_dir, "no such directory").mend("make it"));
        }
        let mut config = ExecutorProcessConfig {
            scheduler_host: host.to_string(),
            scheduler_port: port,
            bind_host: self.bind.ip().to_string(),
            port: self.bind.port(),
            // Nobody calls an executor that asks by itself.
            grpc_port: 0,
            task_scheduling_policy: SCHEDULING,
            external_host: self.host.clone(),
            work_dir: Some(self.work_dir.to_string_lossy().into_owned()),
            memory_pool_size: self.memory,
            // Whichever of the two is started first.
            scheduler_connect_timeout_seconds: 20,
            ..ExecutorProcessConfig::default()
        };
        if let Some(tasks) = self.tasks {
            config.vcores = tasks.into();
        }
        let spill = self.work_dir.clone();
        config.override_runtime_producer = Some(Arc::new(move |_: &SessionConfig| runtime(&spill, None)));
        let subject = format!("executor {}", self.bind);
        start_executor_process(Arc::new(config)).await.map_err(|e| engine_error(&subject, e))
    }
}
