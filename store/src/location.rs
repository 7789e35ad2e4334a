//! Where a store is, as a URL.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::client::Client;
use crate::{Engine, EngineOptions, Error, StableStore};

/// `file:DIR`, `unix:PATH` or `tcp:HOST:PORT?…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A directory of this machine, opened by this process.
    File(PathBuf),
    /// The socket of an `ftstore serve` on this machine.
    Unix(PathBuf),
    /// An `ftstore serve` anywhere.
    Tcp(Tcp),
}

/// How to reach a service over TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tcp {
    /// `HOST:PORT`.
    pub address: String,
    /// `name=`: which of the service's clients this is; with a shared key.
    pub name: String,
    /// `key=FILE`: the shared key.
    pub key: Option<PathBuf>,
    /// `ca=FILE`: who signs the service's certificate (PEM). TLS is used if it is given.
    pub ca: Option<PathBuf>,
    /// `cert=FILE`: our certificate (PEM).
    pub cert: Option<PathBuf>,
    /// `cert-key=FILE`: its key (PEM).
    pub cert_key: Option<PathBuf>,
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self, Error> {
        let invalid = |why: &str| Error::invalid(format!("store {url:?}"), why);
        match url.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => {
                let (address, options) = rest.split_once('?').unwrap_or((rest, ""));
                let port = address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
                if port.and_then(|p| p.parse::<u16>().ok()).is_none() {
                    return Err(invalid("tcp: is followed by HOST:PORT"));
                }
                let mut tcp = Tcp { address: address.to_owned(), ..Tcp::default() };
                for option in options.split('&').filter(|o| !o.is_empty()) {
                    match option.split_once('=') {
                        Some(("name", value)) => value.clone_into(&mut tcp.name),
                        Some(("key", value)) => tcp.key = Some(value.into()),
                        Some(("ca", value)) => tcp.ca = Some(value.into()),
                        Some(("cert", value)) => tcp.cert = Some(value.into()),
                        Some(("cert-key", value)) => tcp.cert_key = Some(value.into()),
                        _ => return Err(invalid(&format!("{option:?} is none of name=, key=, ca=, cert=, cert-key="))),
                    }
                }
                Ok(Self::Tcp(tcp))
            }
            _ => Err(invalid("it must be file:DIR, unix:PATH or tcp:HOST:PORT")),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(tcp) => write!(f, "tcp:{}", tcp.address),
        }
    }
}

impl Location {
    /// Opens the store there.
    ///
    /// # Errors
    /// It is in use or cannot be reached.
    pub fn open(&self) -> Result<Box<dyn StableStore>, Error> {
        match self {
            Self::File(path) => Ok(Box::new(Engine::open(path, EngineOptions::default())?)),
            Self::Unix(_) | Self::Tcp(_) => Ok(Box::new(Client::connect(self)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_what_is_wrong_is_named() {
        let tcp = Tcp { address: "[::1]:7".into(), name: "a".into(), key: Some("/k".into()), ..Tcp::default() };
        assert_eq!("tcp:[::1]:7?name=a&key=/k".parse(), Ok(Location::Tcp(tcp)));
        assert_eq!("file:/x".parse(), Ok(Location::File("/x".into())));
        assert_eq!("unix:/x".parse(), Ok(Location::Unix("/x".into())));
        for bad in ["", "file:", "tcp:", "tcp:host", "tcp:host:99999", "tcp:h:1?tls=off", "http://x"] {
            let e = bad.parse::<Location>().unwrap_err().to_string();
            assert!(e.contains(&format!("{bad:?}")), "{e}");
        }
    }
}
