//! TLS between the two hosts: each proves by a certificate that it is one of those that may move VMs.
//!
//! ```text
//! send ── Socket::Unix ──▶ pump ══════ TLS 1.3 over TCP ══════ pump ◀── Socket::Unix ── receive
//! ```
//!
//! The two sides use a link from several threads, and end it from any of them, which no TLS connection can do. So they get one end of a
//! pair of Unix sockets, and a thread (the pump) carries bytes between the other end and the TLS connection: [`Tunnel`].
//!
//! In TLS 1.3 the client is done before the server has seen its certificate. A sender that was refused would hear of it only later, as
//! of a link that broke; so the server says one byte more when it is content, and the client waits for it.
//!
//! Left out on purpose: sessions are not resumed, for there is one connection a migration; certificates are not looked up in
//! lists of revoked ones.

mod pump;

use super::link::{STALL, Socket};
use crate::error::{Error, ErrorKind, Result};
use pump::Pump;
pub use pump::Tunnel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig,
    ServerConnection,
};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the server says when it has seen a certificate that it believes.
const CONTENT: u8 = 1;
/// How long a side that was refused may take to hear why.
const REFUSAL: Duration = Duration::from_secs(1);
/// What both sides need.
const ALIKE: &str = "give --tls-ca, --tls-cert and --tls-key on both sides or on neither";

/// How long a connection is waited for.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The handshake, and TCP when it takes nothing.
    stall: Duration,
    /// What was written last, after the program has ended the link, until the peer has ended it too.
    farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { stall: STALL, farewell: Duration::from_secs(10) }
    }
}

/// By what a side proves who it is, and whom it believes.
#[derive(Clone, Debug)]
pub struct Credentials {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    limits: Limits,
}

impl Credentials {
    /// Reads PEM files: the CAs whose certificates the other side may show, this side's certificate (and those between it and the
    /// CA), and its private key.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it should be; the key is not the certificate's.
    pub fn load(ca: &Path, cert: &Path, key: &Path) -> Result<Credentials> {
        let mut roots = RootCertStore::empty();
        for der in certificates(ca)? {
            roots
                .add(der)
                .map_err(|e| Error::file(ErrorKind::Corrupt, ca, format!("has a certificate that no CA has: {e}")))?;
        }
        let (roots, chain) = (Arc::new(roots), certificates(cert)?);
        let key_der = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|e| {
            not_pem(&e, key, "private key").mend("name the file with the certificate's key, without a passphrase")
        })?;
        let unfit = |e| match e {
            rustls::Error::InconsistentKeys(_) => {
                let cause = format!("is not the key of the certificate in {}", cert.display());
                Error::file(ErrorKind::Corrupt, key, cause).mend("name the two that were made together")
            }
            e => {
                Error::file(ErrorKind::Corrupt, cert, format!("cannot be used with the key in {}: {e}", key.display()))
            }
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let unusable = |e: &dyn std::fmt::Display| Error::file(ErrorKind::Corrupt, ca, format!("cannot be used: {e}"));
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| unusable(&e))?
            .with_webpki_verifier(servers.build().map_err(|e| unusable(&e))?)
            .with_client_auth_cert(chain.clone(), key_der.clone_key())
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| unusable(&e))?
            .with_client_cert_verifier(clients.build().map_err(|e| unusable(&e))?)
            .with_single_cert(chain, key_der)
            .map_err(unfit)?;
        server.send_tls13_tickets = 0;
        Ok(Credentials { client: Arc::new(client), server: Arc::new(server), limits: Limits::default() })
    }

    /// Makes a link of a connection to a receiver, whose certificate must be for `name`: a DNS name or an IP address.
    ///
    /// # Errors
    /// The receiver is refused, or refuses, or speaks no TLS, or says nothing.
    pub fn connect(&self, tcp: TcpStream, name: &str) -> Result<(Socket, Tunnel)> {
        let known = ServerName::try_from(name.to_string()).map_err(|_| {
            Error::new(ErrorKind::Usage, name, "no certificate can be for such a name")
                .mend("give --tls-name NAME, as it is in the receiver's certificate")
        })?;
        let tls = ClientConnection::new(Arc::clone(&self.client), known).map_err(|e| refusal(e, "receiver"))?;
        self.open(Connection::Client(tls), tcp, "receiver")
    }

    /// Makes a link of a connection from a sender.
    ///
    /// # Errors
    /// See [`Credentials::connect`].
    pub fn accept(&self, tcp: TcpStream) -> Result<(Socket, Tunnel)> {
        let tls = ServerConnection::new(Arc::clone(&self.server)).map_err(|e| refusal(e, "sender"))?;
        self.open(Connection::Server(tls), tcp, "sender")
    }

    fn open(&self, mut tls: Connection, tcp: TcpStream, peer: &str) -> Result<(Socket, Tunnel)> {
        let broke = |e: io::Error| Error::new(ErrorKind::Io, "link", format!("it broke in the TLS handshake: {e}"));
        let socket = Socket::Tcp(tcp.try_clone().map_err(broke)?);
        socket.watch().and_then(|()| tcp.set_nonblocking(true)).map_err(broke)?;
        let until = Instant::now() + self.limits.stall;
        match handshake(&mut tls, &tcp, until) {
            Ok(()) => Pump::start(tls, tcp, self.limits).map_err(broke),
            Err(Failed::Tls(e)) => {
                part(&mut tls, &tcp);
                Err(refusal(e, peer))
            }
            Err(Failed::Late) => {
                let cause = format!("it did not finish the TLS handshake in {} s", self.limits.stall.as_secs_f32());
                Err(Error::new(ErrorKind::Io, peer, cause).mend(ALIKE))
            }
            Err(Failed::Io(e)) => match e.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    let cause = "it ended the connection in the TLS handshake";
                    Err(Error::new(ErrorKind::Io, peer, cause).mend(format!("look at its log; {ALIKE}")))
                }
                _ => Err(broke(e)),
            },
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io(path, "read", e))
}

/// All certificates of a file; there is one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<std::result::Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(not_pem(&pem::Error::NoItemsFound, path, "certificate")),
        Err(e) => Err(not_pem(&e, path, "certificate")),
    }
}

fn not_pem(e: &pem::Error, path: &Path, what: &str) -> Error {
    let cause = match e {
        pem::Error::NoItemsFound => format!("has no {what} in PEM ('-----BEGIN ...')"),
        _ => format!("begins like PEM and is damaged, so there is no {what}"),
    };
    Error::file(ErrorKind::Corrupt, path, cause)
}

/// Why there is no connection.
#[derive(Debug)]
enum Failed {
    Tls(rustls::Error),
    Io(io::Error),
    Late,
}

/// Until each side knows that the other believes it.
fn handshake(tls: &mut Connection, tcp: &TcpStream, until: Instant) -> Result<(), Failed> {
    let mut to_say = matches!(tls, Connection::Server(_));
    let mut content = to_say;
    loop {
        if !tls.is_handshaking() {
            if std::mem::take(&mut to_say) {
                tls.writer().write_all(&[CONTENT]).map_err(Failed::Io)?;
            }
            content = content || heard_content(tls)?;
        }
        let (_, sent) = flush(tls, tcp).map_err(Failed::Io)?;
        if !tls.is_handshaking() && sent && content {
            return Ok(());
        }
        let interest = if sent { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        if Instant::now() >= until {
            return Err(Failed::Late);
        }
        wait(&mut [PollFd::new(tcp, interest)], Some(until)).map_err(Failed::Io)?;
        match tls.read_tls(&mut &*tcp) {
            Ok(0) => return Err(Failed::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => tls.process_new_packets().map(drop).map_err(Failed::Tls)?,
            Err(e) if is_retry(&e) => {}
            Err(e) => return Err(Failed::Io(e)),
        }
    }
}

/// Whether the server has said that it is content.
fn heard_content(tls: &mut Connection) -> Result<bool, Failed> {
    let mut said = [0];
    match tls.reader().read(&mut said) {
        Ok(1) if said == [CONTENT] => Ok(true),
        Ok(0) => Err(Failed::Io(io::ErrorKind::UnexpectedEof.into())),
        Ok(_) => Err(Failed::Tls(rustls::Error::General("it is no vmar that waits for a sender".into()))),
        Err(e) if is_retry(&e) => Ok(false),
        Err(e) => Err(Failed::Io(e)),
    }
}

/// Gives TCP what it takes: so many bytes, and whether nothing is left.
fn flush(tls: &mut Connection, tcp: &TcpStream) -> io::Result<(usize, bool)> {
    let mut bytes = 0;
    while tls.wants_write() {
        match tls.write_tls(&mut &*tcp) {
            Ok(n) => bytes += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok((bytes, false)),
            Err(e) => return Err(e),
        }
    }
    Ok((bytes, true))
}

/// Tells the other side why it is refused. What it still says is read, for a connection that is closed over unread bytes takes
/// back what was written to it.
fn part(tls: &mut Connection, tcp: &TcpStream) {
    let until = Instant::now() + REFUSAL;
    let _ = flush(tls, tcp);
    let _ = tcp.shutdown(Shutdown::Write);
    let (mut tcp, mut rest) = (tcp, [0; 4096]);
    while Instant::now() < until && wait(&mut [PollFd::new(tcp, PollFlags::IN)], Some(until)).is_ok() {
        match tcp.read(&mut rest) {
            Ok(1..) => {}
            Err(e) if is_retry(&e) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

fn is_retry(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Waits until one of them is ready, or the time has come.
fn wait(fds: &mut [PollFd<'_>], until: Option<Instant>) -> io::Result<()> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let left = left.map(Timespec::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(fds, left.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Why this side or the other refuses, in words that say where to look.
fn refusal(e: rustls::Error, peer: &str) -> Error {
    use rustls::Error as Tls;
    let corrupt = |cause: &str| Error::new(ErrorKind::Corrupt, peer, cause);
    match e {
        Tls::InvalidCertificate(e) => doubtful(&e, peer),
        Tls::NoCertificatesPresented => corrupt("it shows no certificate").mend(ALIKE),
        Tls::AlertReceived(alert) => refused(alert, peer),
        Tls::InvalidMessage(_) => Error::new(ErrorKind::Unsupported, peer, "it speaks no TLS").mend(ALIKE),
        Tls::PeerIncompatible(e) => {
            Error::new(ErrorKind::Unsupported, peer, format!("its TLS is not 1.3 as this side knows it: {e:?}"))
                .mend("use the same vmar on both hosts")
        }
        e => corrupt(&format!("the TLS handshake failed: {e}")).mend(ALIKE),
    }
}

/// A certificate that is not believed.
fn doubtful(e: &CertificateError, peer: &str) -> Error {
    use CertificateError as Cert;
    let (cause, mend) = match e {
        Cert::Expired | Cert::ExpiredContext { .. } => {
            ("its certificate has expired".into(), "make it a new one (if both hosts have the right time)")
        }
        Cert::NotValidYet | Cert::NotValidYetContext { .. } => {
            ("its certificate is not valid yet".into(), "set the clocks of both hosts")
        }
        Cert::UnknownIssuer | Cert::BadSignature => {
            ("its certificate is not signed by the CA of --tls-ca".into(), "use the CA that signed it")
        }
        Cert::NotValidForName | Cert::NotValidForNameContext { .. } => {
            (e.to_string(), "give --tls-name with a name that it is for")
        }
        Cert::InvalidPurpose | Cert::InvalidPurposeContext { .. } => {
            (format!("its {e}"), "make it one with clientAuth for sending and serverAuth for receiving")
        }
        e => (format!("its certificate is not believed: {e}"), "make it one as docs/migrate.md says"),
    };
    Error::new(ErrorKind::Corrupt, peer, cause).mend(mend)
}

/// The other side does not believe this one.
fn refused(alert: AlertDescription, peer: &str) -> Error {
    use AlertDescription as Alert;
    let (cause, mend) = match alert {
        Alert::CertificateRequired => ("it wants to see a certificate", "give --tls-cert and --tls-key"),
        Alert::UnknownCA | Alert::DecryptError => (
            "it does not know the CA that signed this side's certificate",
            "use a certificate of the CA of its --tls-ca",
        ),
        Alert::CertificateExpired => (
            "it says that this side's certificate has expired, or is not valid yet",
            "make a new one; look at the clocks",
        ),
        Alert::BadCertificate => {
            ("it does not take this side's certificate", "look at its log: it may be for another name")
        }
        _ => {
            let cause = format!("it refuses in the TLS handshake: {alert:?}");
            return Error::new(ErrorKind::Corrupt, peer, cause).mend("look at its log");
        }
    };
    Error::new(ErrorKind::Corrupt, peer, cause).mend(mend)
}

#[cfg(test)]
mod tests;
