//! What `vmar migrate` is told of TLS.

use crate::error::{Error, ErrorKind, Result};
use crate::migrate::link::Socket;
use crate::migrate::tls::{Credentials, Tunnel};
use std::net::TcpStream;
use std::path::PathBuf;

/// Files of either side.
#[derive(Debug, clap::Args)]
pub struct TlsArgs {
    /// The link is TLS 1.3, and the other side shows a certificate of this CA (PEM). All three files, on both sides, or none
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<PathBuf>,
    /// This side's certificate (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM, without a passphrase)
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    tls_key: Option<PathBuf>,
}

/// The same for a sender.
#[derive(Debug, clap::Args)]
pub struct TlsSendArgs {
    #[command(flatten)]
    files: TlsArgs,
    /// The name or IP address that the receiver's certificate must be for (default: HOST of --link)
    #[arg(long, value_name = "NAME", requires = "tls_ca")]
    tls_name: Option<String>,
}

/// A link, and what must live as long if it is TLS.
pub type Link = (Socket, Option<Tunnel>);

impl TlsArgs {
    /// Reads the files, if there are any, for a link at this address.
    fn load(&self, address: &str) -> Result<Option<Credentials>> {
        let (Some(ca), Some(cert), Some(key)) = (&self.tls_ca, &self.tls_cert, &self.tls_key) else { return Ok(None) };
        if address.starts_with("unix:") {
            return Err(Error::new(ErrorKind::Usage, address, "a Unix socket has no TLS")
                .mend("leave --tls-* out; who may connect is a matter of its owner and mode"));
        }
        Credentials::load(ca, cert, key).map(Some)
    }

    /// What makes a link of a connection from a sender.
    pub fn receiver(&self, address: &str) -> Result<impl FnOnce(TcpStream) -> Result<Link> + use<>> {
        let credentials = self.load(address)?;
        Ok(move |tcp| match credentials {
            Some(credentials) => credentials.accept(tcp).map(|(socket, tunnel)| (socket, Some(tunnel))),
            None => Ok((Socket::Tcp(tcp), None)),
        })
    }
}

impl TlsSendArgs {
    /// What makes a link of a connection to a receiver at this address.
    pub fn sender(&self, address: &str) -> Result<impl FnOnce(TcpStream) -> Result<Link> + use<>> {
        let credentials = self.files.load(address)?;
        let name = self.tls_name.clone().unwrap_or_else(|| host(address).to_string());
        Ok(move |tcp| match credentials {
            Some(credentials) => credentials.connect(tcp, &name).map(|(socket, tunnel)| (socket, Some(tunnel))),
            None => Ok((Socket::Tcp(tcp), None)),
        })
    }
}

/// HOST of HOST:PORT; an IPv6 address without its brackets.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_address() {
        for (address, expected) in
            [("a.example:7000", "a.example"), ("192.0.2.2:1", "192.0.2.2"), ("[2001:db8::1]:7000", "2001:db8::1")]
        {
            assert_eq!(host(address), expected);
        }
    }
}
