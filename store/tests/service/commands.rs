//! The other commands.

use std::process::{Command, Output};

use ftrun_store::{Batch, Durability, Engine, EngineOptions, NewCheckpoint, Page, StableStore, each_record};

use super::{LONG, Service, name, options};

fn ftstore(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ftstore")).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn fill(dir: &std::path::Path) {
    let engine = Engine::open(dir, EngineOptions::default()).unwrap();
    let unit = engine.open(&name("a"), &options(Durability::Disk)).unwrap();
    for sii in 0..300u64 {
        unit.append(Batch::of(sii, [sii.to_le_bytes()])).unwrap();
    }
    let page = |n: u8| -> Page { [n; 4096] };
    let pages: Vec<(u64, Page)> = (0..600).map(|n| (n * 4096, page((n % 250) as u8))).collect();
    let put = |sii, parent, pages: &[(u64, Page)]| {
        unit.put_checkpoint(&NewCheckpoint { sii, parent, manifest: b"manifest", gone: &[], pages: &pages }).unwrap();
    };
    put(100, None, &pages);
    put(200, Some(100), &[(0, page(77))]);
    unit.collect(150, 0).unwrap();
    unit.wait(299, LONG).unwrap();
    unit.release().unwrap();
    engine.close().unwrap();
}

#[test]
fn an_exported_unit_can_be_imported_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    fill(&dir.path().join("store"));
    let from = format!("file:{}", dir.path().join("store").display());
    let file = dir.path().join("a.unit").display().to_string();
    let out = ftstore(&["export", &from, "a", &file]);
    assert!(out.status.success(), "{}", text(&out));
    let again = ftstore(&["export", &from, "a", &file]);
    assert!(!again.status.success() && text(&again).contains("a.unit"), "{}", text(&again));
    let service = Service::start("");
    let to = service.unix().to_string();
    let out = ftstore(&["import", &to, &file, "--unit", "b/c"]);
    assert!(out.status.success(), "{}", text(&out));
    let out = ftstore(&["import", &to, &file, "--unit", "b/c"]);
    assert!(text(&out).contains("another name"), "{}", text(&out));
    let store = service.unix().open().unwrap();
    let unit = store.view(&name("b/c")).unwrap();
    assert_eq!(unit.log().unwrap(), 101..300);
    let mut records = 0;
    each_record(&*unit, 101, &mut |sii, record| {
        assert_eq!(record, sii.to_le_bytes());
        records += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(records, 199);
    assert_eq!(unit.manifest(200).unwrap(), b"manifest");
    let mut pages = Vec::new();
    unit.pages(200, 0..u64::MAX, &mut |address, page| {
        pages.push((address, page.map(|p| p[9])));
        Ok(())
    })
    .unwrap();
    assert_eq!(pages.len(), 600);
    assert_eq!((pages[0], pages[7], pages[250].1), ((0, Some(77)), (7 * 4096, Some(7)), None));
    // A file that was cut leaves nothing behind.
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    let out = ftstore(&["import", &to, &file, "--unit", "d"]);
    assert!(!out.status.success() && text(&out).contains("ends too early"), "{}", text(&out));
    assert!(store.view(&name("d")).is_err());
}

#[test]
fn an_export_that_fails_leaves_nothing_and_a_removed_unit_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    fill(&path);
    let store = format!("file:{}", path.display());
    let file = dir.path().join("a.unit");
    let export = || ftstore(&["export", &store, "a", &file.display().to_string()]);
    // The pages of its checkpoints are gone.
    let mut packs: Vec<_> = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
    packs.retain(|p| p.file_name().unwrap().to_str().unwrap().starts_with("pack-"));
    for pack in packs {
        let mut bytes = std::fs::read(&pack).unwrap();
        let end = bytes.len().min(64 << 10);
        bytes[200..end].fill(9);
        std::fs::write(&pack, bytes).unwrap();
    }
    let out = export();
    assert!(out.status.code() == Some(2) && text(&out).contains("fsck"), "{}", text(&out));
    assert!(!file.exists());
    let out = ftstore(&["rm", &store, "a"]);
    assert!(out.status.success(), "{}", text(&out));
    for out in [ftstore(&["rm", &store, "a"]), export()] {
        assert!(out.status.code() == Some(2) && text(&out).contains("has no unit a"), "{}", text(&out));
    }
    assert!(!file.exists() && !text(&ftstore(&["ls", &store])).contains("101..300"));
}

#[test]
fn ls_gc_and_fsck_say_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    fill(&path);
    let store = format!("file:{}", path.display());
    let out = ftstore(&["ls", &store]);
    assert!(text(&out).contains("101..300"), "{}", text(&out));
    let json: serde_json::Value = serde_json::from_slice(&ftstore(&["ls", &store, "--json"]).stdout).unwrap();
    assert_eq!(json[0]["name"], "a");
    assert!(ftstore(&["gc", &store]).status.success());
    let out = ftstore(&["fsck", &store]);
    assert!(out.status.success() && text(&out).contains("0 findings"), "{}", text(&out));
    // The newest log file with records, a byte in the middle of them.
    let mut logs: Vec<_> = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
    logs.retain(|p| p.file_name().unwrap().to_str().unwrap().starts_with("log-"));
    logs.sort();
    let mut bytes = std::fs::read(&logs[0]).unwrap();
    let at = bytes.windows(8).position(|w| w == 250u64.to_le_bytes()).unwrap();
    bytes[at] ^= 4;
    std::fs::write(&logs[0], bytes).unwrap();
    let out = ftstore(&["fsck", &store]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out).contains("of unit a") && text(&out).contains("log-0"), "{}", text(&out));
    let json: serde_json::Value = serde_json::from_slice(&ftstore(&["fsck", &store, "--json"]).stdout).unwrap();
    assert!(json["findings"].as_array().unwrap().len() > 1);
    // A reader is told, too, and everything before can be read.
    let engine = Engine::open(&path, EngineOptions::default()).unwrap();
    let unit = engine.view(&name("a")).unwrap();
    let mut last = None;
    let e = each_record(&*unit, 101, &mut |sii, _| {
        last = Some(sii);
        Ok(())
    })
    .unwrap_err();
    assert!(e.to_string().contains("250"), "{e}");
    assert!(last.is_some());
}

#[test]
fn wrong_input_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, want) in [
        (&["ls", "http://x"][..], "http://x"),
        (&["ls", "unix:/nonexistent/socket"], "/nonexistent/socket"),
        (&["fsck", "file:/nonexistent"], "/nonexistent"),
        (&["ls", "file:/nonexistent"], "/nonexistent"),
        (&["serve", "--config", "/nonexistent.toml", "--check"], "/nonexistent.toml"),
        #[cfg(not(feature = "nats"))]
        (&["ls", "nats://127.0.0.1:1/s"], "built without the feature `nats`"),
        (&["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
    ] {
        let out = ftstore(arguments);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}");
        assert!(text(&out).contains(want), "{arguments:?}: {}", text(&out));
    }
    // A directory without a store stays as it is.
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let at = format!("file:{}", empty.display());
    for arguments in [&["ls", &at][..], &["gc", &at], &["fsck", &at], &["export", &at, "a", "/x"], &["rm", &at, "a"]] {
        let out = ftstore(arguments);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}");
        assert!(text(&out).contains("there is no store"), "{arguments:?}: {}", text(&out));
    }
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0);
    assert!(!std::path::Path::new("/nonexistent").exists());
    let config = dir.path().join("c.toml");
    std::fs::write(&config, "dir = '/x'\nunix = '/y'\n\nfoo = 3\n").unwrap();
    let out = ftstore(&["serve", "--config", &config.display().to_string(), "--check"]);
    assert!(text(&out).contains("c.toml: line 4") && text(&out).contains("foo"), "{}", text(&out));
    let path = dir.path().join("store");
    let engine = Engine::open(&path, EngineOptions::default()).unwrap();
    let out = ftstore(&["ls", &format!("file:{}", path.display())]);
    assert!(text(&out).contains("in use by another process"), "{}", text(&out));
    drop(engine);
}

#[test]
fn what_is_logged_into_a_file_is_plain() {
    let service = Service::start("");
    let dir = service.path("");
    // It says where it listens, and ends since the port for HTTP is taken.
    let config = format!("dir = '{0}/b'\ntcp = '127.0.0.1:0'\nhttp = '127.0.0.1:{1}'\n", dir.display(), service.http);
    std::fs::write(service.path("b.toml"), config).unwrap();
    let out = ftstore(&["serve", "--config", &service.path("b.toml").display().to_string()]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out).contains("listening") && text(&out).contains(&format!("127.0.0.1:{}", service.http)));
    assert!(!text(&out).contains('\x1b'), "{}", text(&out));
}
