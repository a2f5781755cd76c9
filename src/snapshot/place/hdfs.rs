//! A directory of HDFS, with PARS's own knob: the replication of each file.
//!
//! ```text
//! hdfs://NAMENODE:8020/PREFIX?replication=3&replication-once=1
//! ```
//!
//! Without a name node in the URL (`hdfs:///PREFIX`) the one of `HADOOP_CONF_DIR` is taken. As in S3 there are no locks: see [`super::remote`].

use super::remote::GRACE;
use super::{Care, Object, Place};
use crate::error::{Error, ErrorKind, Result};
use hdfs_native::{Client, ClientBuilder, HdfsError, WriteOptions};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::Runtime;

/// Copies of a file that must not be lost, and of another, when the URL does not say.
const REPLICATION: (u32, u32) = (3, 1);

/// A directory.
pub struct Hdfs {
    url: String,
    prefix: String,
    client: Client,
    replication: (u32, u32),
    /// No two processes have the same, on whatever hosts.
    own: u128,
    written: AtomicU64,
    runtime: Runtime,
}

impl std::fmt::Debug for Hdfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hdfs").field("url", &self.url).field("replication", &self.replication).finish_non_exhaustive()
    }
}

impl Hdfs {
    /// Of a URL. Nothing is asked of the name node yet.
    ///
    /// # Errors
    /// The URL makes no sense.
    pub fn open(url: &str) -> Result<Hdfs> {
        let usage = |cause: String| {
            Error::new(ErrorKind::Usage, format!("--store {url}"), cause)
                .mend("write hdfs://NAMENODE:PORT/PREFIX?replication=3&replication-once=1")
        };
        let (address, query) = url.split_once('?').unwrap_or((url, ""));
        let rest = address.strip_prefix("hdfs://").unwrap_or(address);
        let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let mut replication = REPLICATION;
        for word in query.split('&').filter(|word| !word.is_empty()) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let place = match name {
                "replication" => &mut replication.0,
                "replication-once" => &mut replication.1,
                _ => return Err(usage(format!("has a parameter {name:?} that nobody knows"))),
            };
            *place =
                value.parse().ok().filter(|n| (1..=512).contains(n)).ok_or_else(|| usage(format!("{name}={value}")))?;
        }
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::new(ErrorKind::Io, url, format!("cannot start its thread: {e}")))?;
        let builder = ClientBuilder::new().with_io_runtime(runtime.handle().clone());
        let builder = if host.is_empty() { builder } else { builder.with_url(format!("hdfs://{host}")) };
        let client = builder.build().map_err(|e| usage(e.to_string()))?;
        let prefix = format!("/{}", prefix.trim_matches('/'));
        let own = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Ok(Hdfs { url: address.into(), prefix, client, replication, own, written: AtomicU64::new(0), runtime })
    }

    fn path(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix.trim_end_matches('/'))
    }

    fn ask<T>(&self, what: &str, key: &str, ask: impl Future<Output = hdfs_native::Result<T>>) -> Result<T> {
        self.runtime.block_on(ask).map_err(|e| {
            let subject = format!("{}/{key}", self.url);
            match e {
                HdfsError::FileNotFound(_) => {
                    Error::new(ErrorKind::NotFound, subject, "is not there").mend("check the URL")
                }
                e => Error::new(ErrorKind::Io, subject, format!("cannot {what}: {e}"))
                    .mend("check the URL, the name node and the data nodes"),
            }
        })
    }
}

impl Place for Hdfs {
    fn url(&self) -> &str {
        &self.url
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let path = self.path(folder);
        let found = match self.ask("list it", folder, self.client.list_status(&path, false)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            found => found?,
        };
        let object = |status: hdfs_native::client::FileStatus| {
            let name = status.path.rsplit('/').next().unwrap_or_default().to_string();
            let written = UNIX_EPOCH + Duration::from_millis(status.modification_time);
            Object { name, bytes: status.length as u64, written }
        };
        let mut out: Vec<Object> = found.into_iter().filter(|status| !status.isdir).map(object).collect();
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>> {
        let path = self.path(key);
        self.ask("read it", key, async {
            let file = self.client.read(&path).await?;
            Ok(file.read_range(0, file.file_length()).await?.to_vec())
        })
    }

    fn put(&self, key: &str, bytes: &[u8], care: Care) -> Result<()> {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let staged = self.path(&format!("staging/{}-{}-{number}", self.own, std::process::id()));
        let goal = self.path(key);
        let copies = if care == Care::Critical { self.replication.0 } else { self.replication.1 };
        let bytes = bytes.to_vec();
        let parent = goal.rsplit_once('/').map_or("/", |(parent, _)| parent).to_string();
        self.ask("write it", key, async {
            let mut file = self.client.create(&staged, WriteOptions::default().replication(copies)).await?;
            file.write(bytes.into()).await?;
            file.close().await?;
            self.client.mkdirs(&parent, 0o755, true).await?;
            self.client.rename(&staged, &goal, true).await
        })
    }

    fn remove(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        match self.ask("remove it", key, self.client.delete(&path, false)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.map(|_| ()),
        }
    }

    fn grace(&self) -> Option<u64> {
        Some(GRACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_how_many_copies() {
        let hdfs = Hdfs::open("hdfs://127.0.0.1:8020/kept/?replication=2").unwrap();
        assert_eq!((hdfs.replication, hdfs.path("packs/a").as_str()), ((2, 1), "/kept/packs/a"));
        for url in ["hdfs://h/x?replication=0", "hdfs://h/x?copies=3", "hdfs://h/x?replication=many"] {
            assert_eq!(Hdfs::open(url).unwrap_err().kind(), ErrorKind::Usage, "{url}");
        }
    }
}
