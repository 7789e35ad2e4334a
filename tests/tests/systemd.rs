//! `ftrun install-unit` and what comes of it, under a real systemd (`ftrun_tests::machine`).
//!
//! To break it on purpose: `NotifyAccess=none` or a filter for system calls in the template, no `$$` for `$` in a command line,
//! `RestrictNamespaces=yes` in the sandbox.

use std::path::PathBuf;

use ftrun_tests::binaries::{guest, program_source};
use ftrun_tests::clients::Echo;
use ftrun_tests::installed::{FTRUN, PORT, Service};
use ftrun_tests::machine::Machine;
use ftrun_tests::rng::Rng;
use ftrun_tests::{Error, error};

fn text(path: PathBuf) -> Result<String, Error> {
    Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
}

macro_rules! service {
    ($name:expr, $options:expr, $more:expr) => {
        match Service::echo($name, $options, $more)? {
            Some(service) => service,
            None => return Ok(()),
        }
    };
}

/// The kills that cost nothing, of the program and of the supervisor.
fn survives(service: &Service) -> Result<(), Error> {
    let main = service.get("MainPID")?;
    assert_eq!(main, service.pid("keeper_pid")?);
    let mut echo = service.client()?;
    let pid = echo.ask(b"pid")?;
    for round in 1..=3 {
        for (victim, times) in [("pid", 2 * round - 1), ("supervisor_pid", 2 * round)] {
            service.machine.ok(["kill", "-KILL", &service.pid(victim)?])?;
            assert_eq!(echo.ask(b"pid")?, pid);
            let wanted = format!("brought back {times} time");
            service.machine.await_property(&service.unit, "StatusText", |s| s.contains(&wanted))?;
        }
    }
    service.client()?.ask(b"another")?;
    assert_eq!((service.get("MainPID")?, service.get("NRestarts")?), (main, "0".into()));
    assert_eq!(service.get("ActiveState")?, "active");
    Ok(())
}

#[test]
fn a_service_lives_through_what_kills_it() -> Result<(), Error> {
    let service = service!("shop", &["--durability", "supervisor"], "");
    let machine = &service.machine;
    println!("{}", machine.ok(["systemd-analyze", "verify", "--man=no", &service.unit])?);
    service.systemctl("enable")?;
    service.systemctl("start")?;
    assert_eq!(service.get("StatusText")?, "running");
    // The sandbox is there, and costs no call of the program a filter.
    let keeper = machine.ok(["cat", &format!("/proc/{}/status", service.get("MainPID")?)])?;
    assert!(keeper.contains("NoNewPrivs:\t1\n") && keeper.contains("Seccomp:\t0\n"), "{keeper}");
    survives(&service)?;

    // Who kills the keeper kills the service, which is started again.
    for (times, whom) in [(1, "main"), (2, "all")] {
        machine.ok(["systemctl", "kill", "--signal=KILL", &format!("--kill-whom={whom}"), &service.unit])?;
        machine.await_property(&service.unit, "NRestarts", |n| n == times.to_string())?;
        machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
        service.client()?.ask(b"served again")?;
    }

    let before = service.get("MainPID")?;
    service.systemctl("restart")?;
    assert_ne!(service.get("MainPID")?, before);
    survives(&service)?;

    service.systemctl("stop")?;
    assert_eq!((service.get("ActiveState")?.as_str(), service.get("Result")?.as_str()), ("inactive", "success"));
    let status = machine.ok([FTRUN, "status", "shop"])?;
    assert!(status.starts_with("shop: stopped\n") && status.contains("exit status  143"), "{status}");

    // `ftrun stop` ends it for good, too.
    service.systemctl("start")?;
    service.client()?.ask(b"again")?;
    machine.ok([FTRUN, "stop", "shop"])?;
    machine.await_property(&service.unit, "ActiveState", |s| s == "inactive")?;
    assert_eq!((service.get("Result")?.as_str(), service.get("NRestarts")?.as_str()), ("success", "0"));
    assert_eq!(text(machine.share().join("err"))?, "");
    service.done();
    Ok(())
}

/// What the template leaves out for the sake of speed works, too; what cannot work is named.
#[test]
fn more_can_be_forbidden() -> Result<(), Error> {
    let strict = "LockPersonality=yes\nRestrictSUIDSGID=yes\nRestrictRealtime=yes\nProtectKernelModules=yes\nProtectKernelLogs=yes\n\
                  ProtectClock=yes\nProtectHostname=yes\nProtectKernelTunables=yes\nPrivateDevices=yes\nProtectProc=invisible\n\
                  SystemCallArchitectures=native\nProtectSystem=strict\nProtectHome=yes\n\
                  SystemCallFilter=~@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap\n";
    let service = service!("shop", &["--durability", "supervisor"], strict);
    service.systemctl("start")?;
    survives(&service)?;
    let machine = &service.machine;
    service.systemctl("stop")?;
    let file = machine.share().join("more.conf");
    std::fs::write(&file, format!("{}RestrictNamespaces=yes\n", text(file.clone())?))?;
    machine.ok(["cp", "/mnt/share/more.conf", &format!("/etc/systemd/system/{}.d/more.conf", service.unit)])?;
    machine.ok(["systemctl", "daemon-reload"])?;
    assert!(service.systemctl("start").is_err());
    assert!(
        text(machine.share().join("err"))?.contains("RestrictNamespaces="),
        "{}",
        text(machine.share().join("err"))?
    );
    service.done();
    Ok(())
}

#[test]
fn a_service_runs_as_an_ordinary_user() -> Result<(), Error> {
    let service = service!("plain", &["--as", "nobody", "--durability", "supervisor"], "");
    service.systemctl("start")?;
    let user = service.machine.ok(["stat", "--format=%U", &format!("/proc/{}", service.pid("pid")?)])?;
    assert_eq!(user.trim(), "nobody");
    survives(&service)?;
    service.systemctl("stop")?;
    assert_eq!(service.get("Result")?, "success");
    service.done();
    Ok(())
}

#[test]
fn a_service_is_started_by_its_socket() -> Result<(), Error> {
    let service = service!("web", &["--listen", "127.0.0.1:7000", "--durability", "supervisor"], "");
    let machine = &service.machine;
    machine.ok(["systemctl", "start", "ftrun@web.socket"])?;
    assert_eq!(service.get("ActiveState")?, "inactive");
    // The program would complain if it were not meant by LISTEN_PID, and could not bind to the port again.
    service.client()?.ask(b"first")?;
    survives(&service)?;
    assert_eq!(text(machine.share().join("out"))?, format!("ready {PORT}\n"));
    // Who connects while it is started again waits. (systemd has set the socket to blocking mode meanwhile.)
    machine.ok(["systemctl", "kill", "--signal=KILL", "--kill-whom=all", &service.unit])?;
    service.client()?.ask(b"waited")?;
    service.done();
    Ok(())
}

#[test]
fn the_watchdog_finds_who_hangs() -> Result<(), Error> {
    let service = service!("dog", &["--durability", "supervisor"], "WatchdogSec=4s\nTimeoutAbortSec=500ms\n");
    let machine = &service.machine;
    service.systemctl("start")?;
    let mut echo = service.client()?;
    echo.ask(b"before")?;
    machine.ok(["kill", "-STOP", &service.pid("supervisor_pid")?])?;
    machine.await_property(&service.unit, "StatusText", |s| s.contains("supervisor replaced 1 time"))?;
    echo.ask(b"after")?;
    assert_eq!(service.get("NRestarts")?, "0");
    // A keeper that hangs is for systemd itself.
    machine.ok(["kill", "-STOP", &service.get("MainPID")?])?;
    machine.await_property(&service.unit, "NRestarts", |n| n == "1")?;
    machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
    service.client()?.ask(b"new")?;
    // So is a program that has a watchdog of its own and forgets it.
    let mut echo = service.client()?;
    echo.ask(b"notify WATCHDOG=1")?;
    machine.await_property(&service.unit, "NRestarts", |n| n == "2")?;
    service.done();
    Ok(())
}

/// Every word of a command line arrives as it was given.
#[test]
fn command_lines_arrive_word_by_word() -> Result<(), Error> {
    let Some(machine) = Machine::start()? else { return Ok(()) };
    let script = r#"for word; do printf '<%s>\n' "$word"; done > /mnt/share/words; echo "$VAR" >> /mnt/share/words"#;
    let all: String = (1..=127u8).map(char::from).collect();
    let words = [
        "",
        " ",
        "plain",
        "two words",
        "a\ttab",
        "a\nline",
        "%i %n %% %",
        "$HOME ${HOME} $$ $",
        "'single'",
        "\"double\"",
        ";",
        "\\;",
        "\\",
        "\\n",
        "a\\",
        "#",
        "ü ☃",
        "--",
        "-",
        "*",
        "~",
        "{a,b}",
        "`id`",
        "\u{7f}\u{1}",
        "|",
        "&&",
        all.as_str(),
    ];
    let variable = "a \"b\" $c %d 'e' \\";
    let head =
        [FTRUN, "install-unit", "words", "--env", &format!("VAR={variable}"), "--", "/bin/sh", "-c", script, "sh"];
    println!("{}", machine.ok(head.iter().copied().chain(words))?);
    machine.ok(["systemctl", "daemon-reload"])?;
    println!("{}", machine.ok(["systemd-analyze", "verify", "--man=no", "ftrun@words.service"])?);
    machine.ok(["systemctl", "start", "ftrun@words.service"])?;
    machine.await_property("ftrun@words.service", "ActiveState", |s| s == "inactive")?;
    assert_eq!(machine.property("ftrun@words.service", "Result")?, "success");
    let wanted: String = words.iter().map(|word| format!("<{word}>\n")).collect();
    assert_eq!(text(machine.share().join("words"))?, format!("{wanted}{variable}\n"));
    machine.done();
    Ok(())
}

/// What the program gives into the service manager's keeping goes there, and comes back to its next start.
///
/// Break it: pass messages on without their descriptors.
#[test]
fn what_the_program_leaves_in_safe_keeping_comes_back() -> Result<(), Error> {
    let service = service!("shop", &[], "");
    let machine = &service.machine;
    let script = machine.give(&program_source("safekeeping.py"))?;
    let words = [FTRUN, "install-unit", "shop", "--ready", "program", "--", "/usr/bin/python3", &script, "treasure"];
    println!("{}", machine.ok(words)?);
    machine.ok(["systemctl", "daemon-reload"])?;
    service.systemctl("start")?;
    assert_eq!(service.get("NFileDescriptorStore")?, "1");
    assert_eq!(text(machine.share().join("out"))?, "first\n");
    machine.ok(["systemctl", "kill", "--signal=KILL", "--kill-whom=all", &service.unit])?;
    machine.await_property(&service.unit, "NRestarts", |n| n == "1")?;
    machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
    assert_eq!(text(machine.share().join("out"))?, "first\nagain treasure\n");
    service.done();
    Ok(())
}

/// A user's own service manager runs a unit with nobody's help.
#[test]
fn a_user_has_services_of_their_own() -> Result<(), Error> {
    let Some(machine) = Machine::start()? else { return Ok(()) };
    let program = machine.give(&guest("epoll_echo")?)?;
    let (home, runtime) = ("HOME=/tmp/home", "XDG_RUNTIME_DIR=/tmp/home/run");
    let units = "SYSTEMD_UNIT_PATH=/tmp/home/.config/systemd/user";
    let user = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "env",
        "-u",
        "XDG_CONFIG_HOME",
        home,
        runtime,
        units,
    ];
    let as_user = |words: &[&str]| machine.ok(user.iter().chain(words));
    as_user(&["mkdir", "-p", "--mode=700", "/tmp/home/run", "/tmp/home/.config/systemd/user"])?;
    for target in ["basic", "default", "shutdown", "network"] {
        let text = format!("[Unit]\nDescription={target}\nDefaultDependencies=no\n");
        std::fs::write(machine.share().join("target"), text)?;
        as_user(&["cp", "/mnt/share/target", &format!("/tmp/home/.config/systemd/user/{target}.target")])?;
    }
    let manager = format!(
        "[Service]\nUser=nobody\nType=notify\nDelegate=yes\nEnvironment={home} {runtime} {units} SYSTEMD_GENERATOR_PATH=/mnt/none\n\
         ExecStart=/lib/systemd/systemd --user\n"
    );
    std::fs::write(machine.share().join("manager.service"), manager)?;
    machine.ok(["cp", "/mnt/share/manager.service", "/etc/systemd/system/"])?;
    machine.ok(["systemctl", "daemon-reload"])?;
    machine.ok(["systemctl", "start", "manager.service"])?;

    let port = PORT.to_string();
    println!(
        "{}",
        as_user(&[
            FTRUN,
            "install-unit",
            "mine",
            "--user",
            "--durability",
            "supervisor",
            "--ready",
            "program",
            "--",
            &program,
            &port,
            "READY=1"
        ])?
    );
    as_user(&["systemctl", "--user", "daemon-reload"])?;
    as_user(&["systemctl", "--user", "enable", "ftrun@mine.service"])?;
    as_user(&["systemctl", "--user", "start", "ftrun@mine.service"])?;
    let get = |name| as_user(&["systemctl", "--user", "show", "--value", "--property", name, "ftrun@mine.service"]);
    assert_eq!(get("StatusText")?.trim(), "running");
    machine.enter_network()?;
    let mut echo = Echo::connect(PORT, Rng::new(7), true)?;
    let pid = echo.ask(b"pid")?;
    for key in ["pid", "supervisor_pid", "pid"] {
        let status = as_user(&[FTRUN, "status", "mine", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&status).map_err(|e| error!("{e}: {status}"))?;
        as_user(&["kill", "-KILL", &status[key].to_string()])?;
        assert_eq!(echo.ask(b"pid")?, pid);
        let before = status["recoveries"].as_u64().unwrap_or_default() + 1;
        let wanted = format!("brought back {before} time");
        machine.await_true("the recovery", || Ok(get("StatusText")?.contains(&wanted)))?;
    }
    as_user(&["systemctl", "--user", "stop", "ftrun@mine.service"])?;
    assert_eq!((get("ActiveState")?.trim(), get("Result")?.trim()), ("inactive", "success"));
    machine.done();
    Ok(())
}
