//! Installs the servers that demo and tests run, where we may.

use std::path::Path;
use std::process::{Command, Stdio};

use ftrun_tests::Error;
use ftrun_tests::binaries::installed;
use ftrun_tests::process::is_root;

/// Everything that the tests run.
pub(crate) const SERVERS: &[&str] = &["redis-server", "memcached", "nginx", "python3", "cc"];

/// The Debian package with a program, and the service that its installation may start.
fn package(program: &str) -> (&str, Option<&str>) {
    match program {
        "redis-server" => ("redis-server", Some("redis-server")),
        "memcached" => ("memcached", Some("memcached")),
        "nginx" => ("nginx-light", Some("nginx")),
        "redis-benchmark" => ("redis-tools", None),
        "cc" => ("gcc", None),
        "qemu-system-x86_64" => ("qemu-system-x86", None),
        other => (other, None),
    }
}

/// Makes sure that these programs are there. What cannot be installed is named, and the tests that need it
/// will say so again; that is no error here.
pub(crate) fn ensure(programs: &[&str]) -> Result<(), Error> {
    let missing = || programs.iter().copied().filter(|p| installed(p).is_none()).collect::<Vec<_>>();
    let absent = missing();
    if absent.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = absent.iter().map(|p| package(p).0).collect();
    let by_hand = format!("apt-get install -y {}", packages.join(" "));
    if !is_root() || installed("apt-get").is_none() {
        eprintln!("xtask: not installed: {}; as root: {by_hand}", absent.join(", "));
        return Ok(());
    }
    eprintln!("xtask: {by_hand}");
    // Where the package lists are old or have never been fetched, the first attempt fails.
    if !apt_get(&["install", "-y", "--no-install-recommends"], &packages)? {
        apt_get(&["update"], &[])?;
        apt_get(&["install", "-y", "--no-install-recommends"], &packages)?;
    }
    stop_what_was_started(&absent);
    let still = missing();
    if !still.is_empty() {
        eprintln!("xtask: still not installed: {}", still.join(", "));
    }
    Ok(())
}

fn apt_get(verb: &[&str], packages: &[&str]) -> Result<bool, Error> {
    let mut command = Command::new("apt-get");
    command.arg("-q").args(verb).args(packages).env("DEBIAN_FRONTEND", "noninteractive");
    // Its progress is for people to watch, not part of our output.
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    if let Some(mut out) = child.stdout.take() {
        std::io::copy(&mut out, &mut std::io::stderr())?;
    }
    Ok(child.wait()?.success())
}

/// Stops the services of packages that were not there before us. Whatever ran before was not from them.
fn stop_what_was_started(programs: &[&str]) {
    let manager = if Path::new("/run/systemd/system").exists() { "systemctl" } else { "service" };
    for service in programs.iter().filter_map(|p| package(p).1) {
        let words = if manager == "systemctl" { ["stop", service] } else { [service, "stop"] };
        // Where no service was started there is none to stop.
        let _ = Command::new(manager).args(words).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}
