//! TLS for a connection, by rustls: certificates, the handshake, and records in place of plain bytes.
//!
//! Guards: the TLS handshake is bounded by the connection's deadline; a client certificate's names are used only after
//! rustls has verified it; the work of a handshake is that of a client like any other. Nothing here decides whether TLS is needed: that is the NBD handshake's business.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use rustix::net::SendAncillaryBuffer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::access::CertificateName;
use super::fair::Turn;
use super::socket::{self, Waited};

/// The certificate authority that signs clients' certificates, in PEM.
const CA_FILE: &str = "ca-cert.pem";
/// What that authority has revoked, in PEM; may be missing.
const CRL_FILE: &str = "ca-crl.pem";
/// The server's certificate chain, in PEM.
const CERTIFICATE_FILE: &str = "server-cert.pem";
/// The server's private key, in PEM.
const KEY_FILE: &str = "server-key.pem";

/// Whether clients have to show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Clients are not asked.
    Ignored,
    /// A certificate is verified if there is one.
    Optional,
    /// A verified certificate is needed.
    Required,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate or key file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: pem::Error,
    },
    /// The authority cannot be used.
    #[error("cannot verify clients with {CA_FILE}")]
    Authority(#[from] VerifierBuilderError),
    /// The certificate and the key cannot be used.
    #[error("cannot use the certificate and key")]
    Rustls(#[from] rustls::Error),
}

/// The server's side of TLS: versions 1.2 and 1.3, one certificate.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Refuse everything before TLS, instead of offering it.
    pub required: bool,
    current: Arc<RwLock<Current>>,
}

/// What new clients get.
#[derive(Debug, Clone)]
struct Current {
    config: Arc<ServerConfig>,
    asks_for_certificates: bool,
}

impl Tls {
    /// Reads `server-cert.pem`, `server-key.pem` and, unless clients' certificates are ignored, `ca-cert.pem` and, if there is
    /// one, `ca-crl.pem`: certificates that the authority has revoked.
    ///
    /// # Errors
    ///
    /// [`TlsError`] when a file is missing or unusable.
    pub fn from_directory(directory: &Path, clients: ClientCertificates, required: bool) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = if clients == ClientCertificates::Ignored {
            builder.with_no_client_auth()
        } else {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(&directory.join(CA_FILE))? {
                roots.add(certificate)?;
            }
            let crl_path = directory.join(CRL_FILE);
            let crls = if crl_path.exists() { revoked(&crl_path)? } else { Vec::new() };
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                .with_crls(crls)
                .only_check_end_entity_revocation();
            let optional = clients == ClientCertificates::Optional;
            let verifier = if optional { verifier.allow_unauthenticated() } else { verifier };
            builder.with_client_cert_verifier(verifier.build()?)
        };
        let chain = certificates(&directory.join(CERTIFICATE_FILE))?;
        let key_path = directory.join(KEY_FILE);
        let key = PrivateKeyDer::from_pem_file(&key_path)
            .map_err(|source| TlsError::File { path: key_path.clone(), source })?;
        let mut config = builder.with_single_cert(chain, key)?;
        // No session is resumed: that would let a client in whose certificate was checked earlier, and connections last for
        // days, so nothing is gained by it and no memory of sessions has to be bounded.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let asks_for_certificates = clients != ClientCertificates::Ignored;
        let current = Current { config: Arc::new(config), asks_for_certificates };
        Ok(Self { required, current: Arc::new(RwLock::new(current)) })
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether new clients are asked for a certificate.
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.current().asks_for_certificates
    }

    /// Whether no client is served without it.
    pub(super) const fn required(&self) -> bool {
        self.required
    }

    /// New clients get what `other` has.
    pub(super) fn replace_with(&self, other: &Self) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = other.current();
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)
}

fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    let lists = CertificateRevocationListDer::pem_file_iter(path).map_err(failed)?;
    let lists = lists.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    // A file that was cut off must not admit everybody again.
    if lists.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(lists) }
}

/// An established TLS session. It does not own its socket.
#[derive(Debug)]
pub(super) struct TlsSession {
    connection: Box<ServerConnection>,
    /// Until when everything that is sent has to have been taken.
    deadline: Option<Instant>,
}

impl TlsSession {
    /// Does the TLS handshake on `socket`.
    pub(super) fn accept(
        tls: &Tls,
        socket: BorrowedFd<'_>,
        deadline: Option<Instant>,
        turn: &mut Turn,
    ) -> io::Result<Self> {
        let connection = ServerConnection::new(tls.current().config).map_err(io::Error::other)?;
        let mut session = Self { connection: Box::new(connection), deadline };
        while session.connection.is_handshaking() {
            session.flush(socket, None)?;
            if !session.connection.is_handshaking() {
                break;
            }
            turn.rest();
            if socket::wait(socket, None, None, deadline)? == Waited::TimedOut {
                return Err(io::ErrorKind::TimedOut.into());
            }
            turn.work();
            if session.connection.read_tls(&mut Records::received(socket))? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            session.process(socket)?;
        }
        session.flush(socket, None)?;
        Ok(session)
    }

    /// The names in the client's verified certificate: common names and alternative names.
    pub(super) fn certificate_names(&self) -> Vec<CertificateName> {
        let Some(first) = self.connection.peer_certificates().and_then(<[_]>::first) else { return Vec::new() };
        let Ok((_, certificate)) = X509Certificate::from_der(first) else { return Vec::new() };
        let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        let mut names: Vec<_> = common.map(|name| CertificateName::Common(name.to_owned())).collect();
        if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
            names.extend(alternatives.value.general_names.iter().filter_map(|name| match name {
                GeneralName::DNSName(text) => Some(CertificateName::Dns((*text).to_owned())),
                GeneralName::RFC822Name(text) => Some(CertificateName::Email((*text).to_owned())),
                GeneralName::URI(text) => Some(CertificateName::Uri((*text).to_owned())),
                _ => None,
            }));
        }
        names
    }

    /// From now on sends wait until `deadline`, or as long as it takes.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// As [`socket::receive`], of decrypted bytes.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            self.connection.read_tls(&mut Records::received(socket))?;
            self.process(socket)?;
        }
    }

    /// As [`socket::send_all`], encrypted.
    pub(super) fn send_all(&mut self, socket: BorrowedFd<'_>, mut bytes: &[u8], turn: &mut Turn) -> io::Result<()> {
        while !bytes.is_empty() {
            turn.work();
            let taken = self.connection.writer().write(bytes)?;
            bytes = &bytes[taken..];
            self.flush(socket, Some(&mut *turn))?;
        }
        Ok(())
    }

    /// Tells the client that the end is intended.
    pub(super) fn close(&mut self, socket: BorrowedFd<'_>) {
        self.connection.send_close_notify();
        let _ = self.flush(socket, None);
    }

    fn process(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if let Err(error) = self.connection.process_new_packets() {
            // The alert that tells the client why.
            let _ = self.flush(socket, None);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.flush(socket, None)
    }

    fn flush(&mut self, socket: BorrowedFd<'_>, mut turn: Option<&mut Turn>) -> io::Result<()> {
        while self.connection.wants_write() {
            let turn = turn.as_deref_mut();
            self.connection.write_tls(&mut Records { socket, deadline: self.deadline, turn })?;
        }
        Ok(())
    }
}

/// The socket as rustls wants it: reads do not wait, writes do, until the deadline if there is one.
struct Records<'a> {
    socket: BorrowedFd<'a>,
    deadline: Option<Instant>,
    turn: Option<&'a mut Turn>,
}

impl<'a> Records<'a> {
    fn received(socket: BorrowedFd<'a>) -> Self {
        Self { socket, deadline: None, turn: None }
    }
}

impl Read for Records<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        socket::receive(self.socket, room)
    }
}

impl Write for Records<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut control = SendAncillaryBuffer::default();
        let (socket, turn) = (self.socket, self.turn.as_deref_mut());
        socket::send_some(socket, self.deadline, turn, |flags| {
            rustix::net::sendmsg(socket, slices, &mut control, flags)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
