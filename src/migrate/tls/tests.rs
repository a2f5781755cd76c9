//! Both sides over TCP on this machine: what they carry, what ends them, and whom they refuse.

use super::super::link::{self, NoMessage};
use super::super::wire::{Hello, Message};
use super::super::{receive, send};
use super::*;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::fs;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

/// A CA, and a directory for its certificates.
struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes `NAME.pem` and `NAME.key`, for 127.0.0.1 and what `change` makes of it.
    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::new(["127.0.0.1".to_string()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        fs::write(self.path(&format!("{name}.pem")), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn load(&self, name: &str) -> Credentials {
        let (cert, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        Credentials::load(&self.path("ca.pem"), &cert, &key).unwrap()
    }

    fn credentials(&self) -> Credentials {
        self.sign("host", |_| {});
        self.load("host")
    }
}

type Opened = Result<(Socket, Tunnel)>;

/// What a sender and a receiver with these make of each other, over `tcp`.
fn open(sender: &Credentials, receiver: &Credentials, (near, far): (TcpStream, TcpStream)) -> (Opened, Opened) {
    thread::scope(|scope| {
        let far = scope.spawn(|| receiver.accept(far));
        (sender.connect(near, "127.0.0.1"), far.join().unwrap())
    })
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0)
}

fn both(credentials: &Credentials, tcp: (TcpStream, TcpStream)) -> ((Socket, Tunnel), (Socket, Tunnel)) {
    let (near, far) = open(credentials, credentials, tcp);
    (near.unwrap(), far.unwrap())
}

/// A network that carries so many bytes, and then says that it is broken, or nothing until it is released.
fn network(carries: usize, silent: Option<Arc<AtomicBool>>) -> ((TcpStream, TcpStream), JoinHandle<()>) {
    let (near, a) = tcp();
    let (b, far) = tcp();
    let pumps = thread::spawn(move || {
        let passed = AtomicUsize::new(0);
        let carry = |mut from: &TcpStream, mut to: &TcpStream| {
            let mut buf = vec![0; 10_000];
            while let Ok(n @ 1..) = from.read(&mut buf) {
                let before = passed.fetch_add(n, Ordering::SeqCst);
                let n = n.min(carries.saturating_sub(before));
                if to.write_all(&buf[..n]).is_err() || before + n >= carries {
                    break;
                }
            }
            while silent.as_ref().is_some_and(|released| !released.load(Ordering::SeqCst)) {
                thread::sleep(Duration::from_millis(10));
            }
            for socket in [&a, &b] {
                let _ = socket.shutdown(Shutdown::Both);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| carry(&b, &a));
            carry(&a, &b);
        });
    });
    ((near, far), pumps)
}

/// Noise that differs by place.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed;
    let next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A message of some length.
fn numbered(n: u64) -> Message {
    Message::Return(n.to_le_bytes().repeat(2000))
}

#[test]
fn much_crosses_both_ways_at_once() {
    const ROUNDS: usize = 24;
    let ((near, near_tunnel), (far, far_tunnel)) = both(&Authority::new().credentials(), tcp());
    let data = [noise(2_000_003, 1), noise(2_000_003, 2)];
    thread::scope(|scope| {
        for (socket, mine, other) in [(&near, 0, 1), (&far, 1, 0)] {
            let data = &data;
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    (&mut &*socket).write_all(&data[mine]).unwrap();
                }
            });
            scope.spawn(move || {
                let mut got = vec![0; data[other].len()];
                for _ in 0..ROUNDS {
                    (&mut &*socket).read_exact(&mut got).unwrap();
                    assert!(got == data[other]);
                }
            });
        }
    });
    assert!(!near.is_readable(Duration::ZERO).unwrap(), "more than was written");
    drop(near_tunnel);
    assert!(matches!(link::receive(&far), Err(NoMessage::End)));
    drop(far_tunnel);
}

/// However much is under way in the other direction.
#[test]
fn what_a_side_says_last_is_heard() {
    let credentials = Authority::new().credentials();
    for round in 0..30 {
        let ((near, near_tunnel), (far, far_tunnel)) = both(&credentials, tcp());
        let (last, heard) = if round % 2 == 0 { (&near, &far) } else { (&far, &near) };
        let (last_tunnel, heard_tunnel) =
            if round % 2 == 0 { (near_tunnel, far_tunnel) } else { (far_tunnel, near_tunnel) };
        let long = Message::Return(noise(150_000, round));
        thread::scope(|scope| {
            // Nobody reads this.
            let talk = scope.spawn(|| while link::send(heard, &numbered(round)).is_ok() {});
            for message in [&long, &Message::Ready, &Message::Commit] {
                link::send(last, message).unwrap();
            }
            last.shut();
            let began = Instant::now();
            scope.spawn(move || drop(last_tunnel));
            for message in [&long, &Message::Ready, &Message::Commit] {
                assert_eq!(&link::receive(heard).unwrap(), message, "round {round}");
            }
            assert!(matches!(link::receive(heard), Err(NoMessage::End)), "round {round}");
            talk.join().unwrap();
            drop(heard_tunnel);
            assert!(began.elapsed() < STALL / 2);
        });
    }
}

/// With a reader and a writer at each side, and the network broken in the handshake and at any place after it.
#[test]
fn a_cut_network_ends_both_sides() {
    let credentials = Authority::new().credentials();
    for cut in (1..12).map(|n| n * 307).chain([30_000, 500_000, 5_000_001]) {
        let (tcp, pumps) = network(cut, None);
        let began = Instant::now();
        let (near, far) = open(&credentials, &credentials, tcp);
        // A handshake without certificates would fit into as much.
        if cut < 1000 {
            assert!(near.is_err() && far.is_err(), "{cut}");
        }
        let sides: Vec<_> = [near, far].into_iter().flatten().collect();
        thread::scope(|scope| {
            for (socket, _) in &sides {
                scope.spawn(|| {
                    for n in 0.. {
                        if link::send(socket, &numbered(n)).is_err() {
                            return;
                        }
                    }
                });
                scope.spawn(|| {
                    let mut next = 0;
                    while let Ok(message) = link::receive(socket) {
                        assert!(message == numbered(next), "cut at {cut}");
                        next += 1;
                    }
                });
            }
        });
        drop(sides);
        pumps.join().unwrap();
        assert!(began.elapsed() < STALL / 2, "cut at {cut}: {:?}", began.elapsed());
    }
}

#[test]
fn a_silent_network_is_given_up() {
    let mut credentials = Authority::new().credentials();
    credentials.limits = Limits { stall: Duration::from_millis(700), farewell: Duration::from_millis(300) };
    let released = Arc::new(AtomicBool::new(false));
    let (tcp, pumps) = network(3_000_000, Some(Arc::clone(&released)));
    let ((near, near_tunnel), (far, far_tunnel)) = both(&credentials, tcp);
    let began = Instant::now();
    let mut got: Vec<u8> = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| while link::send(&near, &numbered(1)).is_ok() {});
        // What came before is there, and a last word to nobody does not hold the process up.
        scope.spawn(|| {
            while got.len() < 2_000_000 {
                let mut more = vec![0; 10_000];
                let n = (&far).read(&mut more).unwrap();
                got.extend(&more[..n]);
            }
        });
        assert!(matches!(link::receive(&near), Err(NoMessage::End)));
    });
    assert!(began.elapsed() > Duration::from_millis(600), "{:?}", began.elapsed());
    assert!(link::send(&near, &Message::Ready).is_err());
    drop((near_tunnel, far_tunnel));
    assert!(began.elapsed() < STALL / 2, "{:?}", began.elapsed());
    released.store(true, Ordering::SeqCst);
    pumps.join().unwrap();
}

/// So QEMU does not believe to be sent what waits here. What the far kernel takes is another matter, and kept small.
#[test]
fn little_is_taken_that_nobody_reads() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
    let tcp = (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0);
    let ((near, near_tunnel), (far, far_tunnel)) = both(&Authority::new().credentials(), tcp);
    rustix::io::ioctl_fionbio(near.as_fd(), true).unwrap();
    let data = noise(4 << 20, 5);
    let (mut written, mut idle) = (0, 0);
    while idle < 20 && written < data.len() {
        match (&near).write(&data[written..]) {
            Ok(n) => {
                written += n;
                idle = 0;
            }
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                idle += 1;
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    assert!((100_000..1 << 20).contains(&written), "{written} bytes are under way");
    // And all of it arrives.
    near.shut();
    let drop_near = thread::spawn(move || drop(near_tunnel));
    let mut got = Vec::new();
    (&far).read_to_end(&mut got).unwrap();
    assert!(got == data[..written]);
    drop(far_tunnel);
    drop_near.join().unwrap();
}

fn said(opened: Opened) -> String {
    opened.unwrap_err().to_string()
}

#[test]
fn a_certificate_that_is_not_believed_is_refused_with_the_reason() {
    let ours = Authority::new();
    let good = ours.credentials();
    let other = Authority::new().credentials();
    let (near, far) = open(&other, &other, tcp());
    assert!(near.is_ok() && far.is_ok(), "the other CA is as good, alone");
    ours.sign("old", |params| params.not_after = rcgen::date_time_ymd(2001, 1, 1));
    ours.sign("new", |params| params.not_before = rcgen::date_time_ymd(2998, 1, 1));
    ours.sign("name", |params| {
        params.subject_alt_names = CertificateParams::new(["b.example".to_string()]).unwrap().subject_alt_names
    });
    ours.sign("client", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    ours.sign("server", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);

    let as_sender = |name: &str| open(&ours.load(name), &good, tcp());
    let as_receiver = |name: &str| open(&good, &ours.load(name), tcp());
    // Who is not believed, what it is told, what the other says.
    let check = |refused: Opened, refuses: Opened, told: &str, says: &str| {
        let (refused, refuses) = (said(refused), said(refuses));
        assert!(refused.contains(told) && refuses.contains(says), "{refused} // {refuses}");
    };
    let (near, far) = as_sender("old");
    check(
        near,
        far,
        "receiver: it says that this side's certificate has expired",
        "sender: its certificate has expired",
    );
    let (near, far) = as_receiver("old");
    check(
        far,
        near,
        "sender: it says that this side's certificate has expired",
        "receiver: its certificate has expired",
    );
    let (near, far) = as_sender("new");
    check(near, far, "or is not valid yet", "its certificate is not valid yet");
    let (near, far) = as_receiver("name");
    check(far, near, "for another name", "is only valid for DnsName(\"b.example\"); give --tls-name");
    let (near, far) = as_receiver("client");
    check(far, near, "UnsupportedCertificate", "serverAuth for receiving");
    let (near, far) = as_sender("server");
    check(near, far, "UnsupportedCertificate", "clientAuth for sending");
    let (near, far) = open(&other, &good, tcp());
    check(
        far,
        near,
        "it does not know the CA that signed this side's",
        "receiver: its certificate is not signed by the CA",
    );

    // A sender that believes the receiver, and is not believed.
    let stranger = Authority::new();
    stranger.sign("host", |_| {});
    let stranger =
        Credentials::load(&ours.path("ca.pem"), &stranger.path("host.pem"), &stranger.path("host.key")).unwrap();
    let (near, far) = open(&stranger, &good, tcp());
    check(
        near,
        far,
        "receiver: it does not know the CA",
        "sender: its certificate is not signed by the CA of --tls-ca",
    );
}

#[test]
fn a_sender_without_a_certificate_is_refused() {
    let ours = Authority::new();
    let good = ours.credentials();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ours.path("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let (near, far) = open(&Credentials { client: Arc::new(client), ..good.clone() }, &good, tcp());
    let (near, far) = (said(near), said(far));
    assert!(near.contains("it wants to see a certificate") && far.contains("it shows no certificate"), "{near} {far}");
}

#[test]
fn the_name_is_that_of_the_certificate() {
    let ours = Authority::new();
    ours.sign("host", |params| {
        params.subject_alt_names = CertificateParams::new(["b.example".to_string()]).unwrap().subject_alt_names
    });
    let credentials = ours.load("host");
    for (name, expected) in
        [("b.example", Ok(())), ("c.example", Err("is only valid for")), ("no name", Err("give --tls-name"))]
    {
        let (near, far) = tcp();
        let got = thread::scope(|scope| {
            scope.spawn(|| drop(credentials.accept(far)));
            credentials.connect(near, name).map(drop)
        });
        match (got, expected) {
            (Ok(()), Ok(())) => {}
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
            (got, _) => panic!("{name}: {got:?}"),
        }
    }
}

#[test]
fn who_speaks_no_tls_is_told_so() {
    let good = Authority::new().credentials();
    // A plain receiver, and a sender with TLS.
    let (near, far) = tcp();
    let (sent, received) = thread::scope(|scope| {
        let far = scope.spawn(move || receive::greeted(&Socket::Tcp(far)).unwrap_err().to_string());
        (said(good.connect(near, "127.0.0.1")), far.join().unwrap())
    });
    assert!(received.contains("no known type") && received.contains("--tls-*"), "{received}");
    assert!(sent.contains("it ended the connection in the TLS handshake") && sent.contains("--tls-ca"), "{sent}");
    // The other way round.
    let (near, far) = tcp();
    let (sent, received) = thread::scope(|scope| {
        let far = scope.spawn(|| said(good.accept(far)));
        let sent = send::greet(&Socket::Tcp(near), Hello::default()).unwrap_err().to_string();
        (sent, far.join().unwrap())
    });
    assert!(received.contains("sender: it speaks no TLS; give --tls-ca"), "{received}");
    assert!(sent.contains("--tls-*"), "{sent}");
    // Bytes without sense, and none at all.
    let (mut near, far) = tcp();
    near.write_all(&noise(5000, 9)).unwrap();
    assert!(said(good.accept(far)).contains("it speaks no TLS"));
    let mut hasty = good.clone();
    hasty.limits.stall = Duration::from_millis(300);
    let ((near, _far), (_near, far)) = (tcp(), tcp());
    for late in [said(hasty.connect(near, "127.0.0.1")), said(hasty.accept(far))] {
        assert!(late.contains("did not finish the TLS handshake in 0.3 s"), "{late}");
    }
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let ours = Authority::new();
    ours.sign("a", |_| {});
    ours.sign("b", |_| {});
    let file = |name: &str, text: &str| {
        fs::write(ours.path(name), text).unwrap();
        ours.path(name)
    };
    let (ca, cert, key) = (ours.path("ca.pem"), ours.path("a.pem"), ours.path("a.key"));
    let noise = file("noise", "no PEM\n");
    let broken = file("broken", "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n");
    let empty = file("empty", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let load = |ca: &Path, cert: &Path, key: &Path| Credentials::load(ca, cert, key).unwrap_err().to_string();
    for (said, expected) in [
        (load(&ours.path("none"), &cert, &key), "none: cannot read"),
        (load(&noise, &cert, &key), "noise: has no certificate in PEM"),
        (load(&broken, &cert, &key), "broken: begins like PEM and is damaged"),
        (load(&empty, &cert, &key), "empty: has a certificate that no CA has"),
        (load(&key, &cert, &key), "a.key: has no certificate in PEM"),
        (load(&ca, &noise, &key), "noise: has no certificate in PEM"),
        (load(&ca, &empty, &key), "empty: cannot be used with the key in"),
        (load(&ca, &cert, &cert), "a.pem: has no private key in PEM"),
        (load(&ca, &cert, &ours.path("b.key")), "b.key: is not the key of the certificate in"),
    ] {
        assert!(said.contains(expected), "{said}");
    }
    // Both in one file is usual.
    let all = file("all", &(fs::read_to_string(&cert).unwrap() + &fs::read_to_string(&key).unwrap()));
    Credentials::load(&ca, &all, &all).unwrap();
}
