//! The configuration of the service: a TOML file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::Error;

/// The file. What is not there has the value that `ftrun.toml(5)` gives.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Directory of the store.
    pub dir: PathBuf,
    /// Path of a Unix socket.
    pub unix: Option<PathBuf>,
    /// Address and port for TCP.
    pub tcp: Option<SocketAddr>,
    /// Address and port for health and metrics over HTTP.
    pub http: Option<SocketAddr>,
    /// TLS for `tcp`; needed where it is not a loopback address.
    pub tls: Option<Tls>,
    /// Who may come.
    #[serde(default, rename = "client")]
    pub clients: Vec<ClientEntry>,
    /// What anybody may use up.
    #[serde(default)]
    pub limits: Limits,
}

/// Certificates.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// The service's certificate chain, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Who signs the certificates of clients, PEM. Without it clients prove themselves by shared keys.
    pub client_ca: Option<PathBuf>,
}

/// Somebody who may come. One of `key`, `certificate` and `uid` says how they are known.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ClientEntry {
    /// What they are called.
    pub name: String,
    /// Their units are those below this name; empty: all units, and everything that concerns the whole store.
    pub namespace: String,
    /// File with the shared key.
    pub key: Option<PathBuf>,
    /// SHA-256 of their certificate (DER), in hexadecimal, colons allowed.
    pub certificate: Option<String>,
    /// Their user id on the Unix socket.
    pub uid: Option<u32>,
}

/// What anybody may use up.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Seconds in which a client must have said who it is, and in which a frame that has begun must be whole.
    pub handshake_seconds: u64,
    /// Bytes that a unit may store; 0 is without limit.
    pub quota_bytes: u64,
    /// Bytes of a log or pack file.
    pub segment_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, handshake_seconds: 10, quota_bytes: 0, segment_bytes: 64 << 20 }
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, with file and line.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
        Self::parse(&text).map_err(|why| Error::invalid(path.display().to_string(), why))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            format!("line {line}: {}", e.message())
        })?;
        config.check(text)?;
        Ok(config)
    }

    fn check(&self, text: &str) -> Result<(), String> {
        let line = |key: &str| {
            let at = text.lines().position(|l| l.trim_start().starts_with(key));
            format!("line {}", at.map_or(1, |n| n + 1))
        };
        if self.unix.is_none() && self.tcp.is_none() {
            return Err("line 1: neither unix nor tcp says where to listen".into());
        }
        if let Some(tcp) = self.tcp
            && self.tls.is_none()
            && !tcp.ip().is_loopback()
        {
            return Err(format!("{}: {tcp} is not a loopback address, so it needs [tls]", line("tcp")));
        }
        if let Some(http) = self.http
            && !http.ip().is_loopback()
        {
            return Err(format!("{}: {http} is not a loopback address; put a proxy before it", line("http")));
        }
        let mut known = std::collections::HashSet::new();
        for client in &self.clients {
            let ways = [client.key.is_some(), client.certificate.is_some(), client.uid.is_some()];
            if ways.iter().filter(|w| **w).count() != 1 {
                let entry = line(&format!("name = {:?}", client.name));
                return Err(format!("{entry}: client {} needs one of key, certificate and uid", client.name));
            }
            // One of two would be forgotten.
            let way = match (&client.key, &client.certificate, client.uid) {
                (Some(_), ..) => format!("name {:?} with a key", client.name),
                (_, Some(print), _) => format!("certificate {}", print.replace(':', "").to_ascii_lowercase()),
                (.., uid) => format!("uid {}", uid.unwrap_or_default()),
            };
            if !known.insert(way.clone()) {
                return Err(format!("{}: there are two clients of {way}", line("[[client]]")));
            }
            if !client.namespace.is_empty() {
                crate::UnitName::new(&client.namespace[..]).map_err(|e| format!("{}: {e}", line("namespace")))?;
            }
        }
        if !(1..=3600).contains(&self.limits.handshake_seconds) {
            return Err(format!("{}: handshake-seconds must be from 1 to 3600", line("handshake-seconds")));
        }
        if self.limits.connections == 0 {
            return Err(format!("{}: connections must be 1 or more", line("connections")));
        }
        if !(1 << 20..=1 << 30).contains(&self.limits.segment_bytes) {
            return Err(format!("{}: segment-bytes must be from 1 MiB to 1 GiB", line("segment-bytes")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_line() {
        for (text, want) in [
            ("dir = '/x'\nunix = '/s'\nnosuch = 1\n", "line 3: unknown field `nosuch`"),
            ("dir = '/x'\n", "line 1: neither"),
            ("dir = '/x'\ntcp = '0.0.0.0:7'\n", "line 2: 0.0.0.0:7 is not a loopback"),
            ("dir = 7\n", "line 1: invalid type"),
            ("dir = '/x'\nunix = '/s'\n[limits]\nconnections = -1\n", "line 4: invalid value"),
            ("dir = '/x'\nunix = '/s'\n[[client]]\nname = \"a\"\nnamespace = 'a'\n", "line 4: client a needs one of"),
            ("dir = '/x'\nunix = '/s'\n[limits]\nsegment-bytes = 1\n", "line 4: segment-bytes must"),
            ("dir = '/x'\nunix = '/s'\n[limits]\nhandshake-seconds = 0\n", "line 4: handshake-seconds must"),
            ("dir = '/x'\nunix = '/s'\n[limits]\nhandshake-seconds = 9000000000000000000\n", "line 4: handshake-"),
            ("dir = '/x'\nunix = '/s'\n[limits]\nconnections = 0\n", "line 4: connections must"),
        ] {
            let got = Config::parse(text).unwrap_err();
            assert!(got.starts_with(want), "{text}: {got}");
        }
        let start = "dir = '/x'\nunix = '/s'\n";
        for (way, same) in [
            ("uid = 7", "uid = 7"),
            ("key = '/k'", "key = '/other'"),
            ("certificate = 'AA:BB'", "certificate = 'aabb'"),
        ] {
            let client = |namespace, way| format!("[[client]]\nname = 'a'\nnamespace = '{namespace}'\n{way}\n");
            let got = Config::parse(&format!("{start}{}{}", client("a", way), client("b", same))).unwrap_err();
            assert!(got.contains("there are two clients of"), "{got}");
        }
        let text = "dir = '/x'\nunix = '/s'\n[[client]]\nname = 'a'\nnamespace = 'a'\nuid = 7\n";
        assert_eq!(Config::parse(text).unwrap().clients[0].uid, Some(7));
    }
}
