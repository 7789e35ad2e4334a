//! Clients that check every reply against a model of what must be so.

mod echo;
mod http;
mod memcached;
mod redis;
mod rights;
mod signals;
mod udp;
mod upstream;

pub use echo::{Echo, Visitor, check as check_echo};
pub use http::{Files, Http, pattern};
pub use memcached::Memcached;
pub use redis::{Redis, Saver};
pub use rights::Rights;
pub use signals::Signaller;
pub use udp::Udp;
pub use upstream::Upstream;
