//! The unit dies at each seam, on purpose: between what the kernel did and what the log says, inside a
//! checkpoint, inside a restore, inside a replay.
//!
//! `FTRUN_FAULT=POINT:N` in ftrun's environment kills the unit the Nth time that POINT is passed, and
//! `FTRUN_FAULT=supervisor@POINT:N` the supervisor, which at durability `supervisor` is survived, too.

use std::time::Duration;

use ftrun_tests::binaries::is_bare;
use ftrun_tests::load::Load;
use ftrun_tests::process::Process;
use ftrun_tests::scenarios::{descriptors_of, echo_server, exec_chain_launch, guest_launch, rounds};
use ftrun_tests::unit::{Launch, Ready};
use ftrun_tests::{Error, error};

/// The names between the brackets of `POINTS` in the supervisor's source.
fn points() -> Vec<&'static str> {
    let source = include_str!("../../supervisor/src/fault.rs");
    let list = source.split_once("POINTS").and_then(|(_, rest)| rest.split_once("];")).map_or("", |(list, _)| list);
    list.split('"').skip(1).step_by(2).collect()
}

/// Which of the groups below walks a point: by its name's first word. Those of cold recovery are walked in `cold.rs`, those of
/// fetching a unit, and of losing it, in `lost_machines.rs`, of descriptors that are held in
/// `hold.rs`.
const GROUPS: [&str; 18] = [
    "itself-",
    "hold-",
    "thaw-",
    "call-",
    "hands-",
    "signal-",
    "fatal-",
    "checkpoint-",
    "restore-",
    "replay-",
    "shim-",
    "settle-",
    "standby-",
    "unloggable-",
    "exec-",
    "record-",
    "retrieve-",
    "output-",
];

fn of(group: &str) -> Vec<&'static str> {
    points().into_iter().filter(|p| p.starts_with(group)).collect()
}

/// Runs with the fault armed, and `kills` kills from outside; at least one recovery must have been.
fn walk(
    group: &str,
    passes: &[u64],
    kills: u64,
    run: impl Fn(&Load, Launch) -> Result<(), Error>,
) -> Result<(), Error> {
    let program = || match group {
        "exec-" => exec_chain_launch(),
        "signal-" => guest_launch("timers"),
        "unloggable-" => guest_launch("unlogged"),
        "itself-" => guest_launch("itself"),
        "shim-" => guest_launch("descriptors"),
        // A thread that waits while another wants the turn leaves what it has sent to the supervisor.
        "output-" => guest_launch("thread_echo"),
        _ => guest_launch("epoll_echo"),
    };
    walk_on(program, group, passes, kills, run)
}

/// The same with a program of one's own.
fn walk_on(
    program: impl Fn() -> Result<Launch, Error>,
    group: &str,
    passes: &[u64],
    kills: u64,
    run: impl Fn(&Load, Launch) -> Result<(), Error>,
) -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    assert!(!of(group).is_empty(), "there is no point {group}");
    let victims = match group {
        "shim-" => &[""][..],
        "hands-" | "standby-" | "record-" | "output-" => &["supervisor@"],
        _ => &["", "supervisor@"],
    };
    for (point, victim) in of(group).iter().flat_map(|point| victims.iter().map(move |victim| (point, victim))) {
        for pass in passes {
            let fault = format!("{victim}{point}:{pass}");
            let load = Load { clients: 4, at_least: Duration::from_millis(800), ..Load::from_env().kills(kills) };
            let mut launch = program()?;
            launch.env("FTRUN_FAULT", &fault).options(["--checkpoint-every", "100ms"]);
            if !victim.is_empty() {
                let level = if matches!(group, "record-" | "output-") { "node" } else { "supervisor" };
                launch.options(["--durability", level, "--stable", "cache"]);
            }
            if matches!(group, "call-" | "hands-") {
                // With the shim few calls pass these points.
                launch.options(["--no-shim"]);
            }
            run(&load, launch).map_err(|e| error!("with FTRUN_FAULT={fault}: {e}"))?;
        }
    }
    Ok(())
}

fn echo(load: &Load, launch: Launch) -> Result<(), Error> {
    let report = echo_server(load, launch)?;
    if report.recoveries == 0 { Err(error!("the unit was not killed:\n{report}")) } else { Ok(()) }
}

fn alone(load: &Load, launch: Launch) -> Result<(), Error> {
    let report = rounds(load, launch, |_, _| Ok(()))?;
    if report.recoveries == 0 { Err(error!("the unit was not killed:\n{report}")) } else { Ok(()) }
}

#[test]
fn every_point_is_walked() {
    assert!(points().len() >= 10, "{:?}", points());
    for point in points() {
        assert!(GROUPS.iter().any(|g| point.starts_with(g)), "no test walks {point}");
    }
}

#[test]
fn killed_around_a_call() -> Result<(), Error> {
    // Early in the start, in ld.so; at its end; at the connections. Later calls are served by the shim.
    walk("call-", &[3, 60, 120], 0, echo)
}

/// The supervisor dies before and after the keeper has made a call of the unit: each is made once.
///
/// Break it: have `hands::take_over` forget what has been done, or leave the last result on the desk when the next
/// call is put there.
#[test]
fn the_supervisor_is_killed_around_a_call_of_the_hands() -> Result<(), Error> {
    let passes: Vec<u64> = (1..=60).collect();
    let program = || guest_launch("descriptors");
    walk_on(program, "hands-", &passes, 0, |load, launch| {
        let load = Load { at_least: Duration::from_millis(150), ..load.clone() };
        let report = descriptors_of(&load, launch)?;
        if report.recoveries == 0 { Err(error!("the supervisor was not killed:\n{report}")) } else { Ok(()) }
    })
}

#[test]
fn killed_inside_the_shim() -> Result<(), Error> {
    // A call has three seams: begun; made but not logged; logged but not reported. They are passed one after the
    // other, through two rounds in which each kind of call is made.
    for pass in 1..=60 {
        walk("shim-", &[pass], 0, |load, launch| {
            let load = Load { at_least: Duration::from_millis(150), ..load.clone() };
            let report = descriptors_of(&load, launch)?;
            if report.recoveries == 0 { Err(error!("the unit was not killed:\n{report}")) } else { Ok(()) }
        })?;
    }
    Ok(())
}

/// Connections that have lived for a while: what the kernel has counted of their streams settles what is in doubt.
///
/// Break it: take `Settle` for not done (`Unit::outcome`), or do not count what a call took (`sockets::count`).
#[test]
fn killed_inside_the_shim_on_streams_that_are_counted() -> Result<(), Error> {
    // Receive, send and wait have three seams each; all of them are passed in some order.
    let passes: Vec<u64> = (3000..3024).collect();
    walk_on(|| guest_launch("epoll_echo"), "shim-", &passes, 0, echo)
}

/// Accept in blocking mode, select, epoll_pwait2, ppoll and recvmsg, in the calls of the first connections.
///
/// Break it: leave the message's header out of what is settled (`Unit::settle`).
#[test]
fn killed_inside_the_shim_in_waits_and_messages() -> Result<(), Error> {
    let passes: Vec<u64> = (20..50).collect();
    walk_on(|| guest_launch("waits_echo"), "shim-", &passes, 0, echo)
}

#[test]
fn killed_between_an_unloggable_call_and_its_checkpoint() -> Result<(), Error> {
    walk("unloggable-", &[1, 3], 0, alone)
}

/// Killed while descriptors of the unit's own files in proc(5) are opened again, one after the other: which of them are copies of each
/// other is known to the next.
///
/// Break it: forget `Outside::copies`.
#[test]
fn killed_while_its_own_files_are_opened_again() -> Result<(), Error> {
    walk("itself-", &[1, 2, 3, 4, 5, 6], 1, alone)
}

#[test]
fn killed_inside_an_exec() -> Result<(), Error> {
    walk("exec-", &[1, 2], 0, echo)
}

#[test]
fn killed_around_a_signal() -> Result<(), Error> {
    walk("signal-", &[1, 4], 0, alone)
}

/// A signal that ends the program has been taken from the kernel when the supervisor is killed: the unit ends by it, and
/// does not go on without it.
///
/// Break it: leave `fatal` out of what is kept (`Outside::to_bytes`).
#[test]
fn the_supervisor_is_killed_when_a_signal_ends_the_program() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    for (signal, point) in
        [libc::SIGTERM, libc::SIGUSR1].into_iter().flat_map(|s| of("fatal-").into_iter().map(move |p| (s, p)))
    {
        let mut launch = guest_launch("epoll_echo")?;
        launch.env("FTRUN_FAULT", format!("supervisor@{point}")).options(["--durability", "supervisor"]);
        launch.ready(Ready::Line);
        let unit = launch.start()?;
        Process::open(unit.pid()?)?.signal(signal)?;
        let status = unit.wait()?;
        assert_eq!(status.code(), Some(128 + signal), "{}", unit.stderr()?);
        assert_eq!(unit.status_number("supervisors")?, 2, "the first one was killed");
    }
    Ok(())
}

/// A blocking connect is made with the socket's O_NONBLOCK set for a moment: a supervisor that is killed in that moment
/// does not leave it set, nor does the program see its call end before there is a connection. A blocking accept or read
/// is tried when there is something: one that has been made gives what it took, although there is nothing any more.
///
/// Break it: do not keep the flags (`Begun::mode`, in `Unit::connect`), or have `hands::was_made` say no.
#[test]
fn the_supervisor_is_killed_around_calls_in_blocking_mode() -> Result<(), Error> {
    // All calls of a round, which come after those of the start.
    let passes: Vec<u64> = (40..64).collect();
    let program = || guest_launch("connects");
    walk_on(program, "hands-", &passes, 0, |_, mut launch| {
        launch.ready(Ready::Line);
        let unit = launch.start()?;
        unit.await_recoveries(1)?;
        unit.finish_rounds().map(drop)
    })
}

#[test]
fn killed_inside_a_checkpoint() -> Result<(), Error> {
    // The first checkpoint is the one right after exec.
    walk("checkpoint-", &[1, 2, 5], 0, echo)
}

#[test]
fn killed_inside_a_restore() -> Result<(), Error> {
    walk("restore-", &[1, 2], 3, echo)
}

#[test]
fn killed_inside_a_replay() -> Result<(), Error> {
    walk("replay-", &[1, 2], 3, echo)
}

#[test]
fn the_supervisor_is_killed_between_an_image_and_what_it_replaces() -> Result<(), Error> {
    walk("standby-", &[1, 2, 5], 0, echo)
}

/// Between events that were appended, their acknowledgement and what outputs wait for; between a checkpoint and what it lets go of.
///
/// Break it: have the next supervisor append from where the first one's log ends rather than from where the store's does
/// (`Common::group`).
#[test]
fn the_supervisor_is_killed_between_the_unit_and_its_store() -> Result<(), Error> {
    walk("record-", &[2, 5], 0, echo)
}

/// Before and after the kernel takes an output that the supervisor lets leave.
///
/// Break it: have the next supervisor not take notice of what was on its way (`take_up`).
#[test]
fn the_supervisor_is_killed_while_an_output_leaves() -> Result<(), Error> {
    walk("output-", &[1, 3, 10], 0, echo)
}

/// The unit dies in the shim, and its supervisor while it settles what the shim had begun: the next one settles it.
///
/// Break it: take the operation in doubt back before its event is logged (`Unit::settle`).
#[test]
fn the_supervisor_is_killed_while_it_settles() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let mut settled = 0;
    for pass in 1..=60 {
        for point in of("settle-") {
            let fault = format!("shim-seam:{pass},supervisor@{point}");
            let load = Load { at_least: Duration::from_millis(150), ..Load::from_env().kills(0) };
            let mut launch = guest_launch("descriptors")?;
            launch.env("FTRUN_FAULT", &fault).options(["--checkpoint-every", "100ms", "--durability", "supervisor"]);
            let report = descriptors_of(&load, launch).map_err(|e| error!("with FTRUN_FAULT={fault}: {e}"))?;
            settled += report.supervisors.saturating_sub(1);
        }
    }
    // Of the three seams of a call the second leaves something to be found, if the call is one that is settled.
    assert!(settled >= 10, "only {settled} supervisors had something to settle");
    Ok(())
}
