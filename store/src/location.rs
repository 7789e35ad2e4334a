//! Where a store is, as a URL.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::client::Client;
use crate::{Engine, EngineOptions, Error, StableStore};

/// `file:DIR`, `unix:PATH`, `tcp:HOST:PORT?…` or `nats://HOST:PORT,…/NAME?…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A directory of this machine, opened by this process.
    File(PathBuf),
    /// The socket of an `ftstore serve` on this machine.
    Unix(PathBuf),
    /// An `ftstore serve` anywhere.
    Tcp(Tcp),
    /// A cluster of NATS servers with JetStream.
    Nats(Nats),
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

/// How to reach a store in a NATS cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nats {
    /// `HOST:PORT` of some servers; they name the others.
    pub servers: Vec<String>,
    /// Name of the store, 1 to 64 of `A-Z a-z 0-9 _ -`. A cluster has room for several.
    pub store: String,
    /// `replicas=`: 1 to 5; 3 if it is not given. An acknowledged record is on a majority of them.
    pub replicas: usize,
    /// `user=`: who we are; with a password.
    pub user: String,
    /// `password=FILE`: the file that has it.
    pub password: Option<PathBuf>,
    /// `ca=FILE`: who signs the servers' certificates (PEM). TLS is used if it is given.
    pub ca: Option<PathBuf>,
    /// `cert=FILE`: our certificate (PEM).
    pub cert: Option<PathBuf>,
    /// `cert-key=FILE`: its key (PEM).
    pub cert_key: Option<PathBuf>,
    /// `sync=always`: all servers are known to have `sync_interval: always`.
    pub sync_always: bool,
    /// `monitor=HOST:PORT,…`: the servers' monitoring ports, which are asked for that.
    pub monitor: Vec<String>,
}

fn host_and_port(address: &str) -> bool {
    let port = address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
    port.is_some_and(|port| port.parse::<u16>().is_ok())
}

fn options(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split('&').filter(|o| !o.is_empty()).map(|option| option.split_once('=').unwrap_or((option, "")))
}

/// Certificates are shown where TLS is used.
fn certificates(ca: &Option<PathBuf>, cert: &Option<PathBuf>, key: &Option<PathBuf>) -> Result<(), String> {
    if cert.is_some() != key.is_some() {
        return Err("cert= and cert-key= go together".into());
    }
    if cert.is_some() && ca.is_none() {
        return Err("cert= needs ca=, without which there is no TLS".into());
    }
    Ok(())
}

impl Tcp {
    fn parse(rest: &str) -> Result<Self, String> {
        let (address, more) = rest.split_once('?').unwrap_or((rest, ""));
        if !host_and_port(address) {
            return Err("tcp: is followed by HOST:PORT".into());
        }
        let mut tcp = Self { address: address.to_owned(), ..Self::default() };
        for (name, value) in options(more) {
            match name {
                "name" => value.clone_into(&mut tcp.name),
                "key" => tcp.key = Some(value.into()),
                "ca" => tcp.ca = Some(value.into()),
                "cert" => tcp.cert = Some(value.into()),
                "cert-key" => tcp.cert_key = Some(value.into()),
                _ => return Err(format!("{name:?} is none of name=, key=, ca=, cert=, cert-key=")),
            }
        }
        certificates(&tcp.ca, &tcp.cert, &tcp.cert_key)?;
        if tcp.key.is_some() == tcp.name.is_empty() {
            return Err("name= and key= go together".into());
        }
        Ok(tcp)
    }
}

impl Nats {
    fn parse(rest: &str) -> Result<Self, String> {
        let (place, more) = rest.split_once('?').unwrap_or((rest, ""));
        let (servers, store) = place.split_once('/').unwrap_or((place, ""));
        let list = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let mut nats = Self {
            servers: list(servers),
            store: store.to_owned(),
            replicas: 3,
            user: String::new(),
            password: None,
            ca: None,
            cert: None,
            cert_key: None,
            sync_always: false,
            monitor: Vec::new(),
        };
        let named = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        if !nats.servers.iter().all(|s| host_and_port(s))
            || !store.chars().all(named)
            || !(1..=64).contains(&store.len())
        {
            return Err("nats: is followed by //HOST:PORT,…/NAME".into());
        }
        for (name, value) in options(more) {
            match (name, value.parse::<usize>()) {
                ("replicas", Ok(replicas @ 1..=5)) => nats.replicas = replicas,
                ("user", _) => value.clone_into(&mut nats.user),
                ("password", _) => nats.password = Some(value.into()),
                ("ca", _) => nats.ca = Some(value.into()),
                ("cert", _) => nats.cert = Some(value.into()),
                ("cert-key", _) => nats.cert_key = Some(value.into()),
                ("sync", _) if value == "always" => nats.sync_always = true,
                ("monitor", _) if list(value).iter().all(|s| host_and_port(s)) => nats.monitor = list(value),
                _ => {
                    return Err(format!(
                        "{name}={value} is none of replicas=1 to 5, user=, password=, ca=, cert=, cert-key=, \
                         sync=always, monitor=HOST:PORT,…"
                    ));
                }
            }
        }
        certificates(&nats.ca, &nats.cert, &nats.cert_key)?;
        if nats.password.is_some() == nats.user.is_empty() {
            return Err("user= and password= go together".into());
        }
        Ok(nats)
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self, Error> {
        let invalid = |why: &str| Error::invalid(format!("store {url:?}"), why);
        match url.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => Tcp::parse(rest).map(Self::Tcp).map_err(|why| invalid(&why)),
            Some(("nats", rest)) if rest.starts_with("//") => {
                Nats::parse(&rest[2..]).map(Self::Nats).map_err(|why| invalid(&why))
            }
            _ => Err(invalid("it must be file:DIR, unix:PATH, tcp:HOST:PORT or nats://HOST:PORT,…/NAME")),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(tcp) => write!(f, "tcp:{}", tcp.address),
            Self::Nats(nats) => nats.fmt(f),
        }
    }
}

impl fmt::Display for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nats://{}/{}", self.servers.join(","), self.store)
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
            #[cfg(feature = "nats")]
            Self::Nats(at) => Ok(Box::new(crate::nats::Nats::connect(at)?)),
            #[cfg(not(feature = "nats"))]
            Self::Nats(at) => {
                let why = "this program was built without the feature `nats`; build it with `--features nats`";
                Err(Error::invalid(format!("store {at}"), why))
            }
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
        let Ok(Location::Nats(nats)) = "nats://127.0.0.1:1,localhost:2/s?replicas=1&monitor=a:3,b:4".parse() else {
            panic!()
        };
        assert_eq!((nats.servers.len(), &*nats.store, nats.replicas, nats.monitor.len()), (2, "s", 1, 2));
        assert!("nats://far:1/s?ca=/ca&sync=always".parse::<Location>().is_ok());
        for bad in ["nats:x", "nats://127.0.0.1:1", "nats://127.0.0.1:1/a.b", "nats://127.0.0.1:1/a?replicas=9"] {
            assert!(bad.parse::<Location>().is_err(), "{bad}");
        }
        for (bad, want) in [
            ("tcp:h:1?key=/k", "name= and key="),
            ("tcp:h:1?name=n", "name= and key="),
            ("tcp:h:1?ca=/ca&cert=/c", "cert= and cert-key="),
            ("tcp:h:1?cert=/c&cert-key=/k", "cert= needs ca="),
            ("nats://h:1/s?user=u", "user= and password="),
            ("nats://h:1/s?ca=/ca&cert-key=/k", "cert= and cert-key="),
        ] {
            let e = bad.parse::<Location>().unwrap_err().to_string();
            assert!(e.contains(want), "{bad}: {e}");
        }
        for bad in ["", "file:", "tcp:", "tcp:host", "tcp:host:99999", "tcp:h:1?tls=off", "http://x"] {
            let e = bad.parse::<Location>().unwrap_err().to_string();
            assert!(e.contains(&format!("{bad:?}")), "{e}");
        }
    }
    #[cfg(not(feature = "nats"))]
    #[test]
    fn a_cluster_needs_the_feature() {
        let e = "nats://127.0.0.1:1/s".parse::<Location>().unwrap().open().err().unwrap().to_string();
        assert!(e.contains("nats://127.0.0.1:1/s") && e.contains("--features nats"), "{e}");
    }
}
