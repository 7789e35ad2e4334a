//! A real file system that an error has turned read-only (ext4(5), `errors=remount-ro`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ftrun_store::{Batch, Durability, Engine, EngineOptions, OpenOptions, StableStore, UnitName, each_record};

const LONG: Duration = Duration::from_secs(60);

/// A file system in a file; unmounted with the value.
struct Mounted {
    image: PathBuf,
    at: PathBuf,
}

fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Mounted {
    /// `None` where that is not possible: only root may mount, and a container may have no loop devices.
    fn new(dir: &Path) -> Option<Self> {
        let new = Self { image: dir.join("image"), at: dir.join("at") };
        std::fs::create_dir(&new.at).unwrap();
        std::fs::File::create(&new.image).unwrap().set_len(192 << 20).unwrap();
        run("mkfs.ext4", &["-q", "-F", new.image.to_str()?])?;
        new.mount().then_some(new)
    }

    fn mount(&self) -> bool {
        let [image, at] = [&self.image, &self.at].map(|path| path.to_str().unwrap());
        run("mount", &["-o", "loop,errors=remount-ro", image, at]).is_some()
    }

    fn unmount(&self) -> bool {
        run("umount", &[self.at.to_str().unwrap()]).is_some()
    }

    /// Has the kernel find an error.
    fn fail(&self) {
        let device = run("findmnt", &["-no", "SOURCE", self.at.to_str().unwrap()]).expect("it is mounted");
        let device = Path::new(&device).file_name().unwrap().to_str().unwrap();
        std::fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Break it: have `Stream::sync` say that it went well.
#[test]
fn what_was_acknowledged_is_there_after_the_file_system_turned_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(dir.path()) else {
        eprintln!("not run: nothing can be mounted here");
        return;
    };
    let open = || Engine::open(&mounted.at.join("store"), EngineOptions::default()).unwrap();
    let name = UnitName::new("a").unwrap();
    let mut acknowledged = 0;
    for round in 0..4 {
        let engine = open();
        let options = OpenOptions { holder: "t".into(), ttl: LONG, durability: Durability::Disk };
        let unit = engine.open(&name, &options).unwrap();
        let mut sii = unit.log().unwrap().end;
        assert!(sii >= acknowledged, "round {round}: {sii} of {acknowledged}");
        let mut next = unit.log().unwrap().start;
        each_record(&*unit, next, &mut |at, record| {
            assert_eq!((at, record), (next, &next.to_le_bytes().repeat(90)[..]));
            next += 1;
            Ok(())
        })
        .unwrap();
        let last = sii + 40;
        let refused = loop {
            if sii == last {
                mounted.fail();
            }
            let batch = Batch::of(sii, [sii.to_le_bytes().repeat(90)]);
            match unit.append(batch).and_then(|()| unit.wait(sii, LONG)) {
                Ok(()) => acknowledged = sii + 1,
                Err(e) => break e,
            }
            sii += 1;
        };
        assert!(sii >= last, "round {round}: {refused}");
        assert!(engine.healthy().is_err());
        drop(unit);
        assert!(engine.close().is_err());
        drop(engine);
        assert!(mounted.unmount());
        // What it mends is its own: e2fsck(8) gives 1 then.
        let checked = Command::new("e2fsck").args(["-f", "-y"]).arg(&mounted.image).output().unwrap();
        assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
        assert!(mounted.mount());
    }
    let report = open().fsck().unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}
