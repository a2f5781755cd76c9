//! A bucket of an S3 server.
//!
//! ```text
//! s3://BUCKET/PREFIX?endpoint=http://10.0.0.1:3900&endpoint=http://10.0.0.2:3900&region=garage&credentials=FILE
//!                   &class=STANDARD&class-once=ONEZONE_IA
//! ```
//!
//! What the URL does not say comes from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, …).
//! `credentials` names a file with lines of that form, for several servers with keys of their own. `class` and `class-once` are storage
//! classes for objects that must not be lost, and for those that may be: PARS's replication by page where one bucket is all there is.
//!
//! With several endpoints the next one is asked when one does not answer: nodes of one cluster. When none does, all are asked again: for
//! a minute in the middle of something, so that a server may be restarted; for some seconds before that, since nothing has begun yet; and
//! not again after that was in vain, so that other stores have their turn. One that listens and says nothing is one that does not
//! answer. What a server has understood and refused is an error at once.
//!
//! There are no locks here, and `If-None-Match` is not enforced by all servers: one process at a time may write to the same place
//! from outside. An object that nobody names is removed only when it is older than a day.

use super::{Care, Object, Place};
use crate::error::{Error, ErrorKind, Result};
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{Attribute, Attributes, ObjectMeta, ObjectStore, ObjectStoreExt, PutOptions};
use std::fmt::Debug;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a server may say nothing, with all retries of a request.
const SILENCE: Duration = Duration::from_secs(20);
/// How slow a pack may be sent, in bytes a second: 5 Mbit/s for each one that is under way. How much of a request a server has taken
/// cannot be seen.
const SLOWEST: u64 = 625_000;
/// How long all endpoints are asked again when none answers, in the middle of something and before it has begun. A request that is
/// under way then may still end.
const AGAIN: Duration = Duration::from_secs(60);
const AGAIN_FIRST: Duration = Duration::from_secs(8);
/// Until they are asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// Threads of a place: they send and receive, and compute the digests of what is sent.
const WORKERS: usize = 2;
/// Age of what nobody names until it is removed: longer than any writer takes.
pub(super) const GRACE: u64 = 24 * 60 * 60;

/// One address of the server.
#[derive(Clone, Debug)]
struct Endpoint {
    name: String,
    store: Arc<dyn ObjectStore>,
}

/// An object store.
#[derive(Debug)]
pub struct Remote {
    url: String,
    /// The same without parameters.
    address: String,
    prefix: Key,
    endpoints: Vec<Endpoint>,
    /// Of these the one that answered last.
    current: AtomicUsize,
    /// For how many seconds they are asked again.
    patience: AtomicU64,
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
                _ => {
                    let cause = format!("has a parameter {name:?} that nobody knows");
                    return Err(Error::new(ErrorKind::Usage, format!("--store {url}"), cause)
                        .mend("there are endpoint, region, credentials, class and class-once"));
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
            _ => return Err(usage("is of no kind that is known", "take a directory, s3:// or hdfs://")),
        };
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(WORKERS).on_thread_start(ignore_hangups).enable_all().build();
        let runtime = runtime.map_err(|e| Error::new(ErrorKind::Io, url, format!("cannot start its thread: {e}")))?;
        let Parameters { class, class_once, .. } = parameters;
        let address = address.trim_end_matches('/').to_string();
        Ok(Remote {
            url: url.into(),
            address,
            prefix,
            endpoints,
            current: AtomicUsize::new(0),
            patience: AtomicU64::new(AGAIN_FIRST.as_secs()),
            class,
            class_once,
            runtime,
        })
    }

    fn key(&self, key: &str) -> Key {
        key.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Asks one endpoint after the other, again and again for a while, until one says something that is not its own trouble.
    fn ask<T, F>(&self, what: &str, key: &str, ask: impl Fn(Endpoint) -> F) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let (first, count, began) = (self.current.load(Ordering::Relaxed), self.endpoints.len(), Instant::now());
        let mut tried = 0;
        loop {
            let number = (first + tried) % count.max(1);
            let Some(endpoint) = self.endpoints.get(number) else {
                let cause = "has no endpoint";
                return Err(Error::new(ErrorKind::Usage, &self.url, cause).mend("name one with 'endpoint='"));
            };
            tried += 1;
            // On the runtime's own threads, whatever thread waits here: see `ignore_hangups`.
            let answer = self.runtime.block_on(self.runtime.spawn(ask(endpoint.clone())));
            let e = match answer.unwrap_or_else(|source| Err(object_store::Error::JoinError { source })) {
                Ok(value) => {
                    self.current.store(number, Ordering::Relaxed);
                    self.patience.store(AGAIN.as_secs(), Ordering::Relaxed);
                    return Ok(value);
                }
                Err(e) => e,
            };
            if !is_trouble(&e) {
                self.patience.store(AGAIN.as_secs(), Ordering::Relaxed);
                return Err(self.refused(what, key, &endpoint.name, &e));
            }
            let asked_all = tried >= count;
            if asked_all && began.elapsed().as_secs() >= self.patience.load(Ordering::Relaxed) {
                self.patience.store(0, Ordering::Relaxed);
                return Err(self.refused(what, key, &endpoint.name, &e));
            }
            // Once each: what comes after that says the same.
            if tried <= count {
                let next = if asked_all { "it is asked again for a while" } else { "the next endpoint is asked" };
                log::warn!("{}: cannot {what}: {}; {next}", endpoint.name, said(&e));
            }
            if tried % count == 0 {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// What an operator has to know: which object, which server, what it says, and whose turn it is.
    fn refused(&self, what: &str, key: &str, endpoint: &str, e: &object_store::Error) -> Error {
        use object_store::Error as E;
        let (subject, said) = (format!("{}/{key}", self.address), said(e));
        if matches!(e, E::NotFound { .. }) && !e.to_string().contains("NoSuchBucket") {
            return Error::new(ErrorKind::NotFound, subject, format!("{endpoint} does not have it"))
                .mend("check the URL");
        }
        let mend = match e {
            E::NotFound { .. } => "make the bucket, or check the URL",
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                "check the credentials, what they are allowed in this bucket, and this machine's clock"
            }
            e if e.to_string().contains(ROLES) => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file of them with 'credentials=': there are none, \
                 and this machine has no role"
            }
            e if is_trouble(e) => "see whether this server runs and can be reached from here, or name more endpoints",
            _ => "check the endpoint and the region",
        };
        Error::new(ErrorKind::Io, subject, format!("cannot {what}: {endpoint}: {said}")).mend(mend)
    }
}

/// A server that is gone is an error of a request, and not the end of this process: the command line lets SIGPIPE end it, for `| head`, and
/// writing to a socket that has hung up raises it.
fn ignore_hangups() {
    // SAFETY: all-zero bytes are a valid sigset_t, which sigemptyset then makes an empty one; only this thread's mask changes.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Where machines of Amazon's are told their role; the crate asks there when it has no credentials.
const ROLES: &str = "169.254.169.254";

/// Whether another endpoint, or the same one later, may do better: not when the server has understood, and says no. The crate does not
/// show the status of an answer but in its text.
fn is_trouble(e: &object_store::Error) -> bool {
    let (text, own) = (e.to_string(), |code: &str| format!("status code: {code}"));
    let busy = ["408", "429"].iter().any(|code| text.contains(&own(code)));
    let refused = [own("3"), own("4"), "redirect without LOCATION".into()].iter().any(|no| text.contains(no));
    matches!(e, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. }) && (busy || !refused)
}

/// What went wrong, in one line: the last cause of all. Before it the crate has its retries and the request.
fn said(e: &object_store::Error) -> String {
    let mut last: &dyn std::error::Error = e;
    while let Some(source) = last.source() {
        last = source;
    }
    let (all, last) = (e.to_string(), last.to_string());
    if all.contains("Error performing") || all.contains(&last) {
        shorten(&last)
    } else {
        shorten(&format!("{all}: {last}"))
    }
}

/// Of an answer in XML the code and the message; of any other the beginning.
fn shorten(text: &str) -> String {
    const LONG: usize = 200;
    let text = text.trim_start_matches("Server returned non-2xx status code: ");
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once("</")?.0)
    };
    if let (Some(code), Some((status, _))) = (element("Code"), text.split_once('<')) {
        let message = element("Message").unwrap_or_default();
        return format!("{} {code}: {}", status.trim(), message.trim_end_matches('.'));
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.trim_end_matches(':').chars().take(LONG).collect()
}

/// Waits no longer than this.
async fn within<T>(limit: Duration, answer: impl Future<Output = object_store::Result<T>>) -> object_store::Result<T> {
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        let source = format!("no answer within {} s", limit.as_secs()).into();
        Err(object_store::Error::Generic { store: "this", source })
    })
}

async fn list(store: Arc<dyn ObjectStore>, prefix: Key) -> object_store::Result<Vec<ObjectMeta>> {
    let (mut found, mut out) = (store.list(Some(&prefix)), Vec::new());
    while let Some(meta) = within(SILENCE, found.try_next()).await? {
        out.push(meta);
    }
    Ok(out)
}

async fn get(store: Arc<dyn ObjectStore>, place: Key) -> object_store::Result<Vec<u8>> {
    let found = within(SILENCE, store.get(&place)).await?;
    let mut out = Vec::new();
    let mut body = found.into_stream();
    while let Some(piece) = within(SILENCE, body.try_next()).await? {
        out.extend_from_slice(&piece);
    }
    Ok(out)
}

impl Place for Remote {
    fn url(&self) -> &str {
        &self.url
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let prefix = self.key(folder);
        let found = self.ask("list it", folder, |endpoint| list(endpoint.store, prefix.clone()))?;
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
        self.ask("read it", key, |endpoint| get(endpoint.store, place.clone()))
    }

    fn put(&self, key: &str, bytes: &[u8], care: Care) -> Result<()> {
        let (place, payload) = (self.key(key), bytes.to_vec());
        let class = if care == Care::Critical { &self.class } else { &self.class_once };
        let mut attributes = Attributes::new();
        if let Some(class) = class {
            attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        let payload = object_store::PutPayload::from(payload);
        let limit = SILENCE + Duration::from_secs(bytes.len() as u64 / SLOWEST);
        self.ask("write it", key, |endpoint| {
            let options = PutOptions { attributes: attributes.clone(), ..PutOptions::default() };
            let (place, payload) = (place.clone(), payload.clone());
            async move { within(limit, endpoint.store.put_opts(&place, payload, options)).await.map(|_| ()) }
        })
    }

    fn remove(&self, key: &str) -> Result<()> {
        let place = self.key(key);
        let removed = self.ask("remove it", key, |endpoint| {
            let place = place.clone();
            async move { within(SILENCE, endpoint.store.delete(&place)).await }
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
    let own = !parameters.endpoints.is_empty() || builder.get_config_value(&AmazonS3ConfigKey::Endpoint).is_some();
    if own && !has_credentials(&builder) {
        return Err(Error::new(ErrorKind::Usage, format!("--store {url}"), "there are no credentials for it").mend(
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file of such lines with 'credentials='",
        ));
    }
    // A few at once: a connection that was kept too long. All else is up to `Remote::ask`.
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(1), base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: 2, retry_timeout: SILENCE };
    let options = ClientOptions::new().with_connect_timeout(CONNECT).with_timeout_disabled().with_allow_http(true);
    builder = builder.with_retry(retry).with_client_options(options);
    let built = |builder: AmazonS3Builder| {
        let name = builder.get_config_value(&AmazonS3ConfigKey::Endpoint).unwrap_or_else(|| "S3".into());
        let store = builder.build().map_err(|e| {
            Error::new(ErrorKind::Usage, format!("--store {url}"), said(&e)).mend("name what is missing, see --help")
        })?;
        Ok(Endpoint { name, store: Arc::new(store) })
    };
    match &parameters.endpoints[..] {
        [] => Ok(vec![built(builder)?]),
        endpoints => endpoints.iter().map(|endpoint| built(builder.clone().with_endpoint(endpoint))).collect(),
    }
}

/// Whether it is said who asks. A server of one's own has no roles of machines to ask for.
fn has_credentials(builder: &object_store::aws::AmazonS3Builder) -> bool {
    use object_store::aws::AmazonS3ConfigKey as Is;
    [Is::AccessKeyId, Is::WebIdentityTokenFile, Is::ContainerCredentialsRelativeUri, Is::ContainerCredentialsFullUri]
        .iter()
        .any(|key| builder.get_config_value(key).is_some())
        || builder.get_config_value(&Is::SkipSignature).as_deref() == Some("true")
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

    #[test]
    fn what_a_server_says_is_one_line() {
        let xml = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code>\
                   <Message>Invalid signature.</Message><Resource>/b</Resource></Error>";
        assert_eq!(shorten(xml), "403 Forbidden: AccessDenied: Invalid signature");
        assert_eq!(shorten("Server returned non-2xx status code: 502 Bad Gateway: "), "502 Bad Gateway");
        assert_eq!(shorten("<html>\n  <body>no</body>"), "<html> <body>no</body>");
        assert_eq!(shorten(&"x".repeat(1000)).len(), 200);
    }

    #[test]
    fn who_asks_a_server_of_ones_own_has_to_say_so() {
        use object_store::aws::AmazonS3Builder;
        assert!(!has_credentials(&AmazonS3Builder::new()));
        assert!(has_credentials(&AmazonS3Builder::new().with_access_key_id("a")));
        assert!(has_credentials(&AmazonS3Builder::new().with_skip_signature(true)));
    }

    /// A server that says the same to everybody, and counts how often.
    fn server(status: &'static str, code: &'static str) -> (String, Arc<AtomicUsize>) {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, mut request) = (stream.unwrap(), Vec::new());
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read(&mut byte).unwrap_or(0) == 0 {
                        break;
                    }
                    request.push(byte[0]);
                }
                count.fetch_add(1, Ordering::Relaxed);
                let body = format!("<Error><Code>{code}</Code><Message>of the test</Message></Error>");
                let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                drop(stream.write_all(format!("{head}{body}").as_bytes()));
            }
        });
        (url, asked)
    }

    /// What reading an object from these endpoints ends with.
    fn read_from(endpoints: &[&str]) -> Error {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n").unwrap();
        let endpoints: String = endpoints.iter().map(|endpoint| format!("&endpoint={endpoint}")).collect();
        let url = format!("s3://bucket/x?region=x&credentials={}{endpoints}", file.display());
        Remote::open(&url).unwrap().get("thing").unwrap_err()
    }

    #[test]
    fn the_next_endpoint_is_asked_when_one_is_in_trouble_and_not_when_it_refuses() {
        let (busy, asked_busy) = server("503 Slow Down", "SlowDown");
        let (absent, asked_absent) = server("404 Not Found", "NoSuchKey");
        // Nobody listens where somebody did.
        let gone = format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let error = read_from(&[&gone, &busy, &absent]);
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(asked_busy.load(Ordering::Relaxed) > 0 && asked_absent.load(Ordering::Relaxed) == 1);

        let (forbids, asked_forbids) = server("403 Forbidden", "AccessDenied");
        let error = read_from(&[&forbids, &absent]).to_string();
        assert!(error.contains("AccessDenied") && error.contains("check the credentials"), "{error}");
        assert_eq!((asked_forbids.load(Ordering::Relaxed), asked_absent.load(Ordering::Relaxed)), (1, 1));

        let (malformed, _) = server("400 Bad Request", "AuthorizationHeaderMalformed");
        let error = read_from(&[&malformed, &absent]).to_string();
        assert!(error.contains("region") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_bucket_that_is_not_there_is_no_object_that_is_not_there() {
        let (no_bucket, _) = server("404 Not Found", "NoSuchBucket");
        let error = read_from(&[&no_bucket]);
        assert_ne!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("make the bucket"), "{error}");
    }
}
