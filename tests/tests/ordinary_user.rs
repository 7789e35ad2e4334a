//! Everything works for an ordinary user too: redis and the Python server with their kills as uid 65534.
//!
//! Run by an ordinary user, the other tests show this already; so these need root, to become that user.

use ftrun_tests::Error;
use ftrun_tests::load::Load;
use ftrun_tests::process::is_root;
use ftrun_tests::scenarios;

const ORDINARY: u32 = 65534;

#[test]
fn redis_without_root() -> Result<(), Error> {
    if !is_root() {
        return Ok(());
    }
    let mut launch = scenarios::redis_launch(&[])?;
    launch.as_user(ORDINARY);
    println!("{}", scenarios::redis_with(launch, &Load::from_env())?);
    Ok(())
}

/// Here the kernel does not let us choose process ids, so that each new process of the unit has another.
///
/// Break it: translate the ids in the names of the unit's files in proc(5) one way only.
#[test]
fn itself_without_root() -> Result<(), Error> {
    if !is_root() {
        return Ok(());
    }
    for level in ["process", "supervisor"] {
        let mut launch = scenarios::guest_launch("itself")?;
        launch.as_user(ORDINARY).options(["--durability", level]);
        let load = Load::from_env();
        let load = if level == "supervisor" { load.any_victim() } else { load };
        println!("{}", scenarios::rounds(&load, launch, |_, _| Ok(()))?);
    }
    Ok(())
}

#[test]
fn python_without_root() -> Result<(), Error> {
    if !is_root() {
        return Ok(());
    }
    let mut launch = scenarios::python_launch("asyncio_echo.py")?;
    launch.as_user(ORDINARY);
    println!("{}", scenarios::echo_server(&Load::from_env(), launch)?);
    Ok(())
}
