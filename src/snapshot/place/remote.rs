//! A bucket of an S3 server, or a directory of HDFS.
//!
//! ```text
//! s3://BUCKET/PREFIX?endpoint=http://10.0.0.1:3900&endpoint=http://10.0.0.2:3900&region=garage&credentials=FILE
//!                   &class=STANDARD&class-once=ONEZONE_IA
//! hdfs://NAMENODE:8020/PREFIX?replication=3
//! ```
//!
//! What the URL does not say comes from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, …).
//! `credentials` names a file with lines of that form, for several servers with keys of their own. With several endpoints the
//! next one is asked when one does not answer: nodes of one cluster. `class` and `class-once` are storage classes for objects that
//! must not be lost, and for those that may be: PARS's replication by page where one bucket is all there is. On HDFS it is the
//! replication of each file: so many for the first, 1 for the others.
//!
//! There are no locks here, and `If-None-Match` is not enforced by all servers: one process at a time may write to the same place
//! from outside. An object that nobody names is removed only when it is older than a day.

use super::{Care, Object, Place};
use crate::error::{Error, ErrorKind, Result};
use object_store::path::Path as Key;
use object_store::{Attribute, Attributes, ObjectStore, ObjectStoreExt, PutOptions};
use std::fmt::Debug;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;

/// How long a server may take to begin to answer.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a request may take: a pack of 64 MiB over 5 Mbit/s.
const REQUEST: Duration = Duration::from_secs(120);
/// How long it is tried again before the next endpoint is asked, or none is left.
const AGAIN: Duration = Duration::from_secs(30);
/// Age of what nobody names until it is removed: longer than any writer takes.
const GRACE: u64 = 24 * 60 * 60;

/// Objects of each care, at one endpoint.
#[derive(Clone, Debug)]
struct Endpoint {
    critical: Arc<dyn ObjectStore>,
    once: Arc<dyn ObjectStore>,
}

/// An object store.
#[derive(Debug)]
pub struct Remote {
    url: String,
    prefix: Key,
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    current: AtomicUsize,
    class: Option<String>,
    class_once: Option<String>,
    runtime: Runtime,
}

/// What an operator's URL says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parameters {
    endpoints: Vec<String>,
    region: Option<String>,
    credentials: Option<String>,
    class: Option<String>,
    class_once: Option<String>,
    replication: Option<String>,
}

impl Parameters {
    fn parse(url: &str, query: &str) -> Result<Parameters> {
        let mut out = Parameters::default();
        for word in query.split('&').filter(|word| !word.is_empty()) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let value = Some(value.to_string()).filter(|v| !v.is_empty());
            let place = match name {
                "endpoint" => {
                    out.endpoints.extend(value);
                    continue;
                }
                "region" => &mut out.region,
                "credentials" => &mut out.credentials,
                "class" => &mut out.class,
                "class-once" => &mut out.class_once,
                "replication" => &mut out.replication,
                _ => {
                    let cause = format!("has a parameter {name:?} that nobody knows");
                    return Err(Error::new(ErrorKind::Usage, format!("--store {url}"), cause)
                        .mend("there are endpoint, region, credentials, class, class-once and, of hdfs, replication"));
                }
            };
            *place = value;
        }
        Ok(out)
    }
}

impl Remote {
    /// Of a URL. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// The URL makes no sense, or its credentials cannot be read.
    pub fn open(url: &str) -> Result<Remote> {
        let usage = |cause: &str, mend: &str| Error::new(ErrorKind::Usage, format!("--store {url}"), cause).mend(mend);
        let (address, query) = url.split_once('?').unwrap_or((url, ""));
        let parameters = Parameters::parse(url, query)?;
        let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
        let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if host.is_empty() {
            return Err(usage("names no bucket", "write s3://BUCKET/PREFIX"));
        }
        let prefix = Key::parse(prefix.trim_matches('/')).map_err(|e| usage(&e.to_string(), "take a plain path"))?;
        let endpoints = match scheme {
            "s3" => s3(url, host, &parameters)?,
            "hdfs" => hdfs(url, host, &parameters)?,
            _ => return Err(usage("is of no kind that is known", "take a directory, s3:// or hdfs://")),
        };
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::new(ErrorKind::Io, url, format!("cannot start its thread: {e}")))?;
        let Parameters { class, class_once, .. } = parameters;
        Ok(Remote { url: address.into(), prefix, endpoints, current: AtomicUsize::new(0), class, class_once, runtime })
    }

    fn key(&self, key: &str) -> Key {
        key.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Asks one endpoint after the other, until one says something that is not its own trouble.
    fn ask<T, F>(&self, what: &str, key: &str, ask: impl Fn(Endpoint) -> F) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let (first, count) = (self.current.load(Ordering::Relaxed), self.endpoints.len());
        let mut tried = 0;
        loop {
            let number = (first + tried) % count.max(1);
            let Some(endpoint) = self.endpoints.get(number) else {
                return Err(self.refused(what, key, "has no endpoint"));
            };
            tried += 1;
            match self.runtime.block_on(ask(endpoint.clone())) {
                Ok(value) => {
                    self.current.store(number, Ordering::Relaxed);
                    return Ok(value);
                }
                Err(e) if tried < count && is_trouble(&e) => {
                    log::warn!("{}: {e}; the next endpoint is asked", self.url)
                }
                Err(object_store::Error::NotFound { .. }) => {
                    return Err(Error::new(ErrorKind::NotFound, format!("{}/{key}", self.url), "is not there")
                        .mend("check the URL"));
                }
                Err(e) => return Err(self.refused(what, key, &said(&e))),
            }
        }
    }

    fn refused(&self, what: &str, key: &str, why: &str) -> Error {
        Error::new(ErrorKind::Io, format!("{}/{key}", self.url), format!("cannot {what}: {why}"))
            .mend("check the URL, the credentials and the server")
    }
}

/// Whether another endpoint may do better: not when the server has understood, and says no.
fn is_trouble(e: &object_store::Error) -> bool {
    matches!(e, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. })
}

/// All causes of an error in one line, without what the crate says of retries and requests in front of them.
fn said(e: &object_store::Error) -> String {
    let mut last: &dyn std::error::Error = e;
    while let Some(source) = last.source() {
        last = source;
    }
    let (all, last) = (e.to_string(), last.to_string());
    if all.contains(&last) { all } else { format!("{all}: {last}") }
}

impl Place for Remote {
    fn url(&self) -> &str {
        &self.url
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>> {
        use futures::TryStreamExt;
        let prefix = self.key(folder);
        let found = self.ask("list it", folder, |endpoint| {
            let prefix = prefix.clone();
            async move { endpoint.critical.list(Some(&prefix)).try_collect::<Vec<_>>().await }
        })?;
        let objects = found.into_iter().filter_map(|meta| {
            let name = meta.location.filename()?.to_string();
            Some(Object { name, bytes: meta.size, written: meta.last_modified.into() })
        });
        let mut out: Vec<Object> = objects.collect();
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>> {
        let place = self.key(key);
        self.ask("read it", key, |endpoint| {
            let place = place.clone();
            async move { Ok(endpoint.critical.get(&place).await?.bytes().await?.to_vec()) }
        })
    }

    fn put(&self, key: &str, bytes: &[u8], care: Care) -> Result<()> {
        let (place, payload) = (self.key(key), bytes.to_vec());
        let class = if care == Care::Critical { &self.class } else { &self.class_once };
        let mut attributes = Attributes::new();
        if let Some(class) = class {
            attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        let payload = object_store::PutPayload::from(payload);
        self.ask("write it", key, |endpoint| {
            let store = if care == Care::Critical { endpoint.critical } else { endpoint.once };
            let options = PutOptions { attributes: attributes.clone(), ..PutOptions::default() };
            let (place, payload) = (place.clone(), payload.clone());
            async move { store.put_opts(&place, payload, options).await.map(|_| ()) }
        })
    }

    fn remove(&self, key: &str) -> Result<()> {
        let place = self.key(key);
        let removed = self.ask("remove it", key, |endpoint| {
            let place = place.clone();
            async move { endpoint.critical.delete(&place).await }
        });
        removed.or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })
    }

    fn grace(&self) -> Option<u64> {
        Some(GRACE)
    }
}

fn s3(url: &str, bucket: &str, parameters: &Parameters) -> Result<Vec<Endpoint>> {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::{BackoffConfig, ClientOptions, RetryConfig};
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    if let Some(file) = &parameters.credentials {
        let text = std::fs::read_to_string(file).map_err(|e| Error::io(Path::new(file), "read the credentials", e))?;
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, value) = line.split_once('=').unwrap_or((line, ""));
            let key: AmazonS3ConfigKey = name.trim().to_ascii_lowercase().parse().map_err(|_| {
                Error::file(ErrorKind::Usage, file, format!("{name:?} is nothing that S3 needs"))
                    .mend("write lines such as AWS_ACCESS_KEY_ID=... and AWS_SECRET_ACCESS_KEY=...")
            })?;
            builder = builder.with_config(key, value.trim());
        }
    }
    if let Some(region) = &parameters.region {
        builder = builder.with_region(region);
    }
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(200), max_backoff: Duration::from_secs(5), base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: 8, retry_timeout: AGAIN };
    let options = ClientOptions::new().with_connect_timeout(CONNECT).with_timeout(REQUEST).with_allow_http(true);
    builder = builder.with_retry(retry).with_client_options(options);
    let built = |builder: AmazonS3Builder| {
        let store = builder.build().map_err(|e| {
            Error::new(ErrorKind::Usage, format!("--store {url}"), said(&e)).mend("name what is missing, see --help")
        })?;
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        Ok(Endpoint { critical: Arc::clone(&store), once: store })
    };
    match &parameters.endpoints[..] {
        [] => Ok(vec![built(builder)?]),
        endpoints => endpoints.iter().map(|endpoint| built(builder.clone().with_endpoint(endpoint))).collect(),
    }
}

#[cfg(feature = "hdfs")]
fn hdfs(url: &str, host: &str, parameters: &Parameters) -> Result<Vec<Endpoint>> {
    use hdfs_native_object_store::HdfsObjectStoreBuilder;
    let replication = parameters.replication.as_deref().unwrap_or("3");
    let open = |replication: &str| -> Result<Arc<dyn ObjectStore>> {
        let builder = HdfsObjectStoreBuilder::new().with_url(format!("hdfs://{host}"));
        let store = builder.with_config([("dfs.replication", replication)]).build().map_err(|e| {
            Error::new(ErrorKind::Usage, format!("--store {url}"), said(&e)).mend("check the name node's address")
        })?;
        Ok(Arc::new(store))
    };
    Ok(vec![Endpoint { critical: open(replication)?, once: open("1")? }])
}

#[cfg(not(feature = "hdfs"))]
fn hdfs(url: &str, _: &str, _: &Parameters) -> Result<Vec<Endpoint>> {
    Err(Error::new(ErrorKind::Unsupported, format!("--store {url}"), "this vmar was built without HDFS")
        .mend("build it with 'cargo build --release --features hdfs'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_how() {
        let p =
            Parameters::parse("u", "endpoint=http://a:1&endpoint=http://b:1&region=g&class-once=ONEZONE_IA").unwrap();
        assert_eq!(p.endpoints, ["http://a:1", "http://b:1"]);
        assert_eq!(
            (p.region.as_deref(), p.class.as_deref(), p.class_once.as_deref()),
            (Some("g"), None, Some("ONEZONE_IA"))
        );
        for (url, word) in [
            ("s3://bucket/x?colour=red", "colour"),
            ("s3:///x", "bucket"),
            ("ftp://host/x", "no kind"),
            ("s3://b/x?credentials=/nowhere/at/all", "/nowhere/at/all"),
        ] {
            let error = Remote::open(url).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{url}: {error}");
        }
    }

    #[test]
    fn a_file_of_credentials_has_lines_as_the_environment_has() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        let url = format!("s3://bucket?endpoint=http://127.0.0.1:1&region=x&credentials={}", file.display());
        std::fs::write(&file, "# of the test\nAWS_ACCESS_KEY_ID=a\naws_secret_access_key = b\n").unwrap();
        Remote::open(&url).unwrap();
        std::fs::write(&file, "PASSWORD=a\n").unwrap();
        let error = Remote::open(&url).unwrap_err().to_string();
        assert!(error.contains("PASSWORD") && error.contains("keys"), "{error}");
    }
}
