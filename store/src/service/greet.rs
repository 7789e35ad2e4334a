//! Who may come in, and which units are theirs.

use std::collections::HashMap;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio_rustls::TlsAcceptor;

use super::config::{Config, Tls};
use crate::client::read_key;
use crate::net::EXPORTER_LABEL;
use crate::{Error, UnitName};

/// What is known of the other side before it says anything.
#[derive(Debug)]
pub(super) enum Peer {
    Unix { uid: Option<u32> },
    Tcp { certificate: Option<[u8; 32]>, channel: [u8; 32] },
}

impl Peer {
    pub(super) fn of_tls(connection: &ServerConnection) -> Self {
        let mut channel = [0; 32];
        // It fails only before the handshake is done.
        let _ = connection.export_keying_material(&mut channel, EXPORTER_LABEL, None);
        let certificate = connection.peer_certificates().and_then(|chain| chain.first()).map(|c| sha256(c));
        Self::Tcp { certificate, channel }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    out
}

/// The units of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace(String);

impl Namespace {
    /// Whether it is everything.
    pub(super) fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// The name in the store.
    pub(super) fn outer(&self, unit: &UnitName) -> Result<UnitName, Error> {
        if self.is_all() { Ok(unit.clone()) } else { UnitName::new(format!("{}/{unit}", self.0)) }
    }

    /// The client's name for a unit, if it is one of theirs.
    pub(super) fn inner(&self, unit: &UnitName) -> Option<UnitName> {
        if self.is_all() {
            return Some(unit.clone());
        }
        let name = unit.as_str().strip_prefix(&self.0)?.strip_prefix('/')?;
        UnitName::new(name).ok()
    }
}

/// Those who may come.
#[derive(Debug)]
pub(super) struct Door {
    keys: HashMap<String, (Vec<u8>, Namespace)>,
    certificates: HashMap<[u8; 32], Namespace>,
    uids: HashMap<u32, Namespace>,
}

/// What a client must do to come in.
#[derive(Debug)]
pub(super) enum Entry<'a> {
    Open(Namespace),
    /// Prove that it has this key.
    Prove(&'a [u8], Namespace),
}

impl Door {
    pub(super) fn new(config: &Config) -> Result<Self, Error> {
        let mut door = Self { keys: HashMap::new(), certificates: HashMap::new(), uids: HashMap::new() };
        // Who could read the files anyway.
        let own = std::fs::metadata("/proc/self").map_err(|e| Error::io("look at", "/proc/self", &e))?;
        for uid in [0, std::os::unix::fs::MetadataExt::uid(&own)] {
            door.uids.insert(uid, Namespace(String::new()));
        }
        for client in &config.clients {
            let namespace = Namespace(client.namespace.clone());
            if let Some(path) = &client.key {
                door.keys.insert(client.name.clone(), (read_key(path)?, namespace));
            } else if let Some(hex) = &client.certificate {
                let bad =
                    || Error::invalid(format!("certificate of client {}", client.name), "not a SHA-256 in hexadecimal");
                let hex: String = hex.chars().filter(|c| *c != ':').collect();
                let digits = hex
                    .as_bytes()
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|two| std::str::from_utf8(two).ok().and_then(|two| u8::from_str_radix(two, 16).ok()));
                let bytes: Option<Vec<u8>> = digits.collect();
                let print = bytes.and_then(|b| b.try_into().ok()).filter(|_| hex.len() == 64).ok_or_else(bad)?;
                door.certificates.insert(print, namespace);
            } else if let Some(uid) = client.uid {
                door.uids.insert(uid, namespace);
            }
        }
        Ok(door)
    }

    /// What somebody who says to be `client` must do; nothing opens the door for a stranger.
    pub(super) fn admit(&self, peer: &Peer, client: &str) -> Option<Entry<'_>> {
        match peer {
            Peer::Unix { uid } => self.uids.get(&(*uid)?).cloned().map(Entry::Open),
            Peer::Tcp { certificate: Some(print), .. } => self.certificates.get(print).cloned().map(Entry::Open),
            Peer::Tcp { certificate: None, .. } => {
                self.keys.get(client).map(|(key, namespace)| Entry::Prove(key, namespace.clone()))
            }
        }
    }
}

pub(super) fn tls(tls: &Tls) -> Result<TlsAcceptor, Error> {
    let bad =
        |path: &std::path::Path, e: &dyn std::fmt::Display| Error::invalid(path.display().to_string(), e.to_string());
    let read = |path: &std::path::Path| -> Result<Vec<CertificateDer<'static>>, Error> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|e| bad(path, &e))?.collect();
        all.map_err(|e| bad(path, &e))
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| bad(&tls.cert, &e))?;
    let config = match &tls.client_ca {
        None => config.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for cert in read(ca)? {
                roots.add(cert).map_err(|e| bad(ca, &e))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            config.with_client_cert_verifier(verifier.allow_unauthenticated().build().map_err(|e| bad(ca, &e))?)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|e| bad(&tls.key, &e))?;
    let config = config.with_single_cert(read(&tls.cert)?, key).map_err(|e| bad(&tls.cert, &e))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
