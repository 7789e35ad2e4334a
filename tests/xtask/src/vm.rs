//! `cargo xtask vm`: ftrun on a Debian kernel in a virtual machine, for what this machine's kernel does not have.
//!
//! The kernel of Debian 12 has no asynchronous write protection but soft-dirty bits, so there the second backend of
//! dirty-page tracking runs for real. The machine is emulated in software and needs no privileges; its root is a
//! file system in memory with busybox, ftrun and our self-checking programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ftrun_tests::binaries::{build_ftrun, guest, need, target_dir, workspace};
use ftrun_tests::{Error, error};

/// What runs in the machine.
const PROGRAMS: [&str; 5] = ["memory", "descriptors", "timers", "files", "forks"];

/// The Debian package that depends on the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// How long the machine may run, seconds.
const LIMIT: &str = "600";

/// Builds the machine, runs it, and judges what it printed.
pub(crate) fn run(backend: &str) -> Result<(), Error> {
    crate::install::ensure(&["qemu-system-x86_64", "busybox", "cc"])?;
    let dir = target_dir()?.join("vm");
    let kernel = kernel(&dir.join("kernel"))?;
    let image = root(&dir)?;
    eprintln!("xtask: starting {}", kernel.display());
    let machine = Command::new(need("timeout")?)
        .args(["-s", "KILL", LIMIT, "qemu-system-x86_64", "-m", "1024", "-cpu", "max", "-nographic", "-no-reboot"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&machine.stdout);
    judge(&text, backend).map_err(|e| error!("{e}\n{text}"))
}

fn judge(text: &str, backend: &str) -> Result<(), Error> {
    let said: Vec<&str> = text.lines().filter_map(|l| l.trim().strip_prefix("VM ")).collect();
    for program in PROGRAMS {
        let line =
            said.iter().find(|l| l.starts_with(program)).ok_or_else(|| error!("nothing was said of {program}"))?;
        println!("{line}");
        let words: Vec<&str> = line.split(' ').collect();
        let value = |name: &str| words.iter().skip_while(|w| **w != name).nth(1).copied().unwrap_or("");
        let rounds = value("rounds");
        let good = value("backend") == backend
            && value("recoveries") == "6"
            && value("verify") == "0"
            && value("exit") == "0"
            && rounds.parse::<u64>().is_ok_and(|n| n > 0)
            && value("distinct") == rounds;
        if !good {
            return Err(error!("{program} did not survive in the virtual machine: {line}"));
        }
    }
    if said.last() == Some(&"end") { Ok(()) } else { Err(error!("the virtual machine did not end by itself")) }
}

fn ran(command: &mut Command) -> Result<String, Error> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(error!("{command:?}: {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Fetches the newest kernel's package, once, and unpacks it.
fn kernel(dir: &Path) -> Result<PathBuf, Error> {
    let found = |dir: &Path| -> Option<PathBuf> {
        let boot = std::fs::read_dir(dir.join("boot")).ok()?;
        boot.flatten().map(|e| e.path()).find(|p| p.to_string_lossy().contains("/vmlinuz"))
    };
    if let Some(kernel) = found(dir) {
        return Ok(kernel);
    }
    std::fs::create_dir_all(dir)?;
    let depends = ran(Command::new("apt-cache").args(["depends", KERNEL]))?;
    let package = depends.split_whitespace().find(|w| w.starts_with("linux-image-") && *w != KERNEL);
    let package = package.ok_or_else(|| error!("{KERNEL} names no kernel; run apt-get update"))?;
    ran(Command::new("apt-get").args(["download", package]).current_dir(dir))?;
    let archive =
        std::fs::read_dir(dir)?.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "deb"));
    let archive = archive.ok_or_else(|| error!("apt-get downloaded no package"))?;
    ran(Command::new("dpkg-deb").arg("-x").arg(archive).arg(dir))?;
    found(dir).ok_or_else(|| error!("{package} has no kernel in it"))
}

/// Makes the machine's root: programs, the libraries that they need, and its first process.
fn root(dir: &Path) -> Result<PathBuf, Error> {
    let root = dir.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    for name in ["bin", "proc", "sys", "dev", "tmp"] {
        std::fs::create_dir_all(root.join(name))?;
    }
    let mut programs = vec![("busybox".into(), need("busybox")?), ("ftrun".to_owned(), build_ftrun()?)];
    for name in PROGRAMS {
        programs.push((name.to_owned(), guest(name)?));
    }
    for (name, from) in &programs {
        std::fs::copy(from, root.join("bin").join(name))?;
        // A static program has no libraries, which ldd calls an error.
        let libraries = Command::new("ldd").arg(from).stderr(Stdio::null()).output()?;
        for path in String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
            let to = root.join(path.trim_start_matches('/'));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::copy(path, to)?;
        }
    }
    std::fs::write(root.join("programs"), PROGRAMS.join("\n"))?;
    std::fs::copy(workspace().join("tests/vm/init.sh"), root.join("init"))?;
    let image = dir.join("root.cpio");
    let archive = "find . | busybox cpio -o -H newc";
    let status = Command::new("sh")
        .args(["-c", archive])
        .current_dir(&root)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&image)?)
        .stderr(Stdio::null())
        .status()?;
    if status.success() { Ok(image) } else { Err(error!("{archive}: {status}")) }
}
