//! What a store has of a unit, laid out in memory as its processes would have left it ([`crate::remains`]): from there cold
//! recovery goes on with it, on this machine or another one.

use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ftrun_ckpt::image;
use ftrun_ckpt::pages::{PageStore, ZERO_PAGE};
use ftrun_store::{UnitName, each_record};

use crate::cli::StoreOptions;
use crate::evlog::EventLog;
use crate::recorder::{Link, Manifest, Place, refused};
use crate::remains::{Remains, Spec};
use crate::report::Error;
use crate::run::log_bytes;
use crate::standby;
use crate::status::{State, Status, Timestamp};
use crate::unitdir::UnitDir;

/// Between two looks at a lease that somebody else has.
const AGAIN: Duration = Duration::from_millis(200);

/// Fetches the unit of this name, for the calling process to be its keeper. From here on whoever ran it before cannot store
/// anything more.
///
/// A process of its own does it, and prints what goes wrong: a keeper has no threads but its own, and a client of a store
/// has some. The calling process must have one thread.
///
/// # Errors
/// The store cannot be reached, has no such unit, or what it has is damaged; there is no room in memory.
pub fn retrieve(dir: &mut UnitDir, store: &StoreOptions) -> Result<(), Error> {
    let keeper = std::process::id() as i32;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        0 => {
            let code = match fetch(dir, store, keeper) {
                Ok(()) => 0,
                Err(e) => {
                    // Nothing else can be done with a failure to print.
                    let _printed = e.print(&mut std::io::stderr());
                    i32::from(e.exit_code())
                }
            };
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        -1 => Err(Error::bug(format!("a process to fetch the unit: {}", std::io::Error::last_os_error()))),
        child => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            if status != 0 {
                return Err(Error::environment(format!("the unit {} was not fetched", dir.name()), ""));
            }
            dir.begun();
            Ok(())
        }
    }
}

fn fetch(dir: &mut UnitDir, store: &StoreOptions, keeper: i32) -> Result<(), Error> {
    let place = Place::new(store, dir, keeper, Vec::new());
    let wrong = |e: ftrun_store::Error| refused(&place.url, &e);
    let name = UnitName::new(place.unit.clone()).map_err(wrong)?;
    let link = open(&place, &name)?;
    crate::fault::point_beside("retrieve-opened");
    let unit = &link.unit;
    let none = || {
        Error::environment(
            format!("the store {} has no checkpoint of a unit {name}", place.url),
            "see `ftstore ls` for what it has, and start the unit anew with `ftrun run`",
        )
    };
    let sii = unit.checkpoints().map_err(wrong)?.last().ok_or_else(none)?.sii;
    let manifest = unit.manifest(sii).map_err(wrong)?;
    let Manifest { spec, snapshot } = postcard::from_bytes(&manifest).map_err(|e| damaged(&place, &e))?;
    let mut spec = Spec::read(&spec).map_err(|e| damaged(&place, &e))?;
    spec.use_store(StoreOptions { url: Some(place.url.clone()), stable: store.stable });
    let mut pages = PageStore::new();
    let mut each = |at: u64, page: Option<&ftrun_store::Page>| {
        pages.put(at, page.unwrap_or(&ZERO_PAGE)).map_err(|e| ftrun_store::Error::Io {
            op: "keep".into(),
            what: "a page".into(),
            cause: e.to_string(),
        })
    };
    unit.pages(sii, 0..u64::MAX, &mut each).map_err(wrong)?;
    let mut records = Vec::new();
    let mut keep = |_, record: &[u8]| {
        records.push(record.to_vec());
        Ok(())
    };
    // A checkpoint may be there before all the events that it stands for: then nothing has come behind it.
    if unit.log().map_err(wrong)?.end > sii + 1 {
        each_record(&**unit, sii + 1, &mut keep).map_err(wrong)?;
    }
    dir.forget_memory();
    dir.begin()?;
    let status = Status {
        name: dir.name().to_owned(),
        state: State::Recovering,
        started_at: Timestamp::now(),
        ..Status::default()
    };
    dir.write_status(&status)?;
    let memory = dir.memory_dir()?;
    lay(&memory, &spec, snapshot.incarnation, &records, |memory| {
        image::write(memory, &snapshot, None, &pages, &[], standby::OPTIONS).map(drop).map_err(|e| e.to_string())
    })
    .inspect_err(|_| dir.forget_memory())?;
    crate::fault::point_beside("retrieve-laid");
    Ok(())
}

/// Lays it all out.
fn lay(
    memory: &Path,
    spec: &Spec,
    incarnation: u32,
    records: &[Vec<u8>],
    write_image: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), Error> {
    let failed = |what: &dyn std::fmt::Display| {
        Error::environment(
            format!("{}: {what}", memory.display()),
            "give the file system more room (mount -o remount,size=SIZE /dev/shm)",
        )
    };
    let (desk, file) = Remains::lay(memory, spec)?;
    // Its first supervisor takes over.
    desk.generation.store(1, SeqCst);
    desk.incarnation.store(incarnation, SeqCst);
    desk.recoveries.store(u64::from(incarnation.saturating_sub(1)), SeqCst);
    write_image(memory).map_err(|e| failed(&e))?;
    let bytes: u64 = records.iter().map(|record| record.len() as u64 + 16).sum();
    let largest = records.iter().map(|record| record.len() as u64).max().unwrap_or(0);
    // Half of a ring is what one record may take.
    let room = log_bytes(spec.options()).max(2 * (bytes + largest));
    let mut log = EventLog::create(file, room).map_err(|e| failed(&e))?;
    for record in records {
        log.append(record).map_err(|_full| failed(&"the events do not fit"))?;
    }
    Ok(())
}

/// Opens the unit for writing: nobody else does from here on. Waits for the lease of somebody who may be alive.
fn open(place: &Place, name: &UnitName) -> Result<Link, Error> {
    let known = place.url.parse::<ftrun_store::Location>().and_then(|l| l.open()).and_then(|store| store.units());
    if !known.map_err(|e| refused(&place.url, &e))?.iter().any(|u| u.name == *name) {
        return Err(Error::environment(
            format!("the store {} has no unit {name}", place.url),
            "see `ftstore ls` for what it has",
        ));
    }
    let mut told = false;
    loop {
        match place.open(name) {
            Ok(link) => return Ok(link),
            Err(e @ ftrun_store::Error::Held { .. }) => {
                if !std::mem::replace(&mut told, true) {
                    eprintln!("ftrun: {e}; waiting until it is known to be dead");
                }
                std::thread::sleep(AGAIN);
            }
            Err(e) => return Err(refused(&place.url, &e)),
        }
    }
}

fn damaged(place: &Place, what: &dyn std::fmt::Display) -> Error {
    Error::environment(
        format!("the store {}: the unit's checkpoint cannot be read: {what}", place.url),
        "use the ftrun that wrote it, or look at the store with `ftstore fsck`",
    )
}
