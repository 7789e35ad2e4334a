use std::time::Duration;

use super::options::default_name;
use super::*;
use crate::unitdir::check_name;

fn ok(args: &[&str]) -> Cli {
    parse(std::iter::once("ftrun").chain(args.iter().copied())).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

fn refused(args: &[&str]) -> String {
    parse(std::iter::once("ftrun").chain(args.iter().copied())).expect_err("refused").to_string()
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn the_word_run_may_be_left_out() {
    let plain = ok(&["--", "prog", "-x", "--name", "y"]);
    assert!(plain.command.is_none());
    assert_eq!(plain.run.command, ["prog", "-x", "--name", "y"]);
    assert_eq!(plain.run.checkpoint_every, Duration::from_secs(1));
    assert_eq!(plain.run.checkpoint_log, 64 << 20);

    let named = ok(&["--name", "x", "--env", "A=b=c", "--cwd", "/", "-vv", "--", "ls", "--json"]);
    assert!(named.command.is_none(), "ls after -- is a program");
    assert_eq!(named.run.name.as_deref(), Some("x"));
    assert_eq!(named.run.env, [("A".into(), "b=c".into())]);
    assert_eq!(named.global.verbose, 2);

    let args = ["--state-dir", "/s", "run", "--name", "x", "--no-shim", "--durability", "process"];
    let run = ok(&[&args[..], &["-v", "--", "run"]].concat());
    assert_eq!(run.global.state_dir.as_deref(), Some(Path::new("/s")));
    let Some(Command::Run(run)) = run.command else { panic!("run") };
    assert_eq!(run.name.as_deref(), Some("x"));
    assert!(run.no_shim);
    assert_eq!(run.command, ["run"]);
}

#[test]
fn commands() {
    let ls = ok(&["--state-dir", "/s", "-v", "ls", "--json"]);
    assert_eq!((ls.global.state_dir.as_deref(), ls.global.verbose), (Some(Path::new("/s")), 1));
    assert!(matches!(ls.command, Some(Command::Ls { json: true })));
    let at_end = ok(&["status", "n", "--json", "--state-dir", "/s"]);
    assert_eq!(at_end.global.state_dir.as_deref(), Some(Path::new("/s")));
    assert!(matches!(
        ok(&["log", "n", "--from", "3", "--to", "9"]).command,
        Some(Command::Log { from: Some(3), to: Some(9), .. })
    ));
    for one in ["checkpoint", "stop", "rm", "verify"] {
        ok(&[one, "n"]);
        assert!(refused(&[one]).contains("<NAME>"));
    }
    ok(&["install-unit", "n", "--", "p"]);
    ok(&["doctor", "--json"]);
    ok(&["completions", "zsh"]);
    ok(&["man"]);
}

/// What `install-unit` writes into the service is what `run` would have been given.
#[test]
fn options_of_a_service_are_those_of_run() {
    let options = |args: &[&str]| match ok(&[&["install-unit", "n"], args, &["--", "p", "--no-shim"]].concat()).command
    {
        Some(Command::InstallUnit(install)) => install.options,
        other => panic!("{other:?}"),
    };
    assert_eq!(options(&[]), [""; 0]);
    let given =
        ["--print", "--durability", "supervisor", "--env", "A=b=c", "--no-shim", "--env", "D= %", "-vv", "--user"];
    let wanted = ["--durability=supervisor", "--env=A=b=c", "--env=D= %", "--no-shim", "--verbose", "--verbose"];
    assert_eq!(options(&given), wanted);
    assert_eq!(options(&["--cwd", "x", "--state-dir", "y", "--log-format=json"]), ["--log-format=json"]);
    assert!(refused(&["install-unit", "n", "--name", "m", "--", "p"]).contains("install-unit"));
    assert!(refused(&["install-unit", "a/b", "--", "p"]).contains("letters, digits"));
    assert!(refused(&["install-unit", "--", "p"]).contains("<NAME>"));
    assert!(refused(&["install-unit", "n"]).contains("PROGRAM"));
}

#[test]
fn refusals_say_why() {
    let cases: [(&[&str], &str); 16] = [
        (&["--ready", "never", "--", "p"], "program"),
        (&["--name", "a/b", "--", "p"], "letters, digits"),
        (&["--name", "x", "ls"], "--name"),
        (&["--name", "x"], "PROGRAM"),
        (&["run"], "PROGRAM"),
        (&["redis-server"], "ftrun -- redis-server"),
        (&["--name", "x", "redis-server", "--port", "1"], "ftrun -- redis-server"),
        (&["run", "prog"], "ftrun -- prog"),
        (&["ls", "foo"], "unexpected argument 'foo'"),
        (&["--durability", "machine", "--", "p"], "process"),
        (&["--checkpoint-every", "1", "--", "p"], "write 1s or 1ms"),
        (&["--checkpoint-every", "0s", "--", "p"], "between 1ms"),
        (&["--checkpoint-log", "64MB", "--", "p"], "KiB, MiB or GiB"),
        (&["--checkpoint-log", "1k", "--", "p"], "at least 64KiB"),
        (&["--env", "novalue", "--", "p"], "NAME=VALUE"),
        (&["--log-format", "xml", "--", "p"], "json"),
    ];
    for (args, want) in cases {
        let said = refused(args);
        assert!(said.contains(want), "{args:?}: {said}");
    }
}

fn with_config(text: &str, args: &[&str]) -> Result<Cli, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shop.toml");
    std::fs::write(&path, text).unwrap();
    let option = format!("--config={}", path.display());
    let words = ["ftrun", "run", &option].into_iter().chain(args.iter().copied());
    parse(words).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

/// Break it: have the file win (`Config::apply`), or keep silent about a key that there is not.
#[test]
fn a_file_has_what_the_command_line_has_not() {
    let text = "name = 'shop'\ndurability = 'node'\nstore = 'file:/s'\nstable = \"cache\"\ncheckpoint-every = '2s'\n\
                checkpoint-log = 1048576\nno-shim = true\nresume = false\ncommand = ['redis-server', '--port', '7000']\n\
                [env]\nA = 'file'\nB = 'b = c'\n";
    let run = |args: &[&str]| match with_config(text, args).map(|cli| cli.command) {
        Ok(Some(Command::Run(run))) => run,
        other => panic!("{other:?}"),
    };
    let plain = run(&[]);
    assert_eq!((plain.name.as_deref(), plain.store.as_deref()), (Some("shop"), Some("file:/s")));
    assert_eq!((plain.durability, plain.stable), (Durability::Node, Stable::Cache));
    assert_eq!((plain.checkpoint_every, plain.checkpoint_log), (Duration::from_secs(2), 1 << 20));
    assert_eq!((plain.no_shim, plain.resume, plain.journal), (true, false, false));
    assert_eq!(plain.command, ["redis-server", "--port", "7000"]);
    assert_eq!(plain.env, [("A".into(), "file".into()), ("B".into(), "b = c".into())]);
    let given = run(&["--name", "other", "--stable=disk", "--env", "A=line", "--resume", "--", "true"]);
    assert_eq!((given.name.as_deref(), given.stable, given.resume), (Some("other"), Stable::Disk, true));
    assert_eq!((given.durability, given.checkpoint_every), (Durability::Node, Duration::from_secs(2)));
    assert_eq!((&given.command[..], given.env.last()), (&["true".into()][..], Some(&("A".into(), "line".into()))));
    let short = with_config("", &[]).expect_err("no program");
    assert!(short.contains("PROGRAM"), "{short}");
}

#[test]
fn what_is_wrong_with_a_file_is_named_with_its_place() {
    for (text, want) in [
        ("durability = 'node'\ndurabilty = 'node'\n", "shop.toml:2:1: unknown key `durabilty`"),
        ("config = 'x'\n", "shop.toml:1:1: unknown key `config`"),
        ("state-dir = '/x'\n", "shop.toml:1:1: unknown key `state-dir`"),
        ("\n  durability = 'machine'\n", "shop.toml:2:16: durability: invalid value 'machine'"),
        ("durability = 'machine'\n", "[possible values: process, supervisor, node]"),
        ("checkpoint-every = 1\n", "shop.toml:1:20: checkpoint-every: invalid value '1'"),
        ("journal = 'yes'\n", "shop.toml:1:11: journal: it is true or false"),
        ("name = true\n", "shop.toml:1:8: name: it is a string"),
        ("command = 'redis-server'\n", "shop.toml:1:11: command: it is an array"),
        ("command = []\n", "shop.toml:1:11: command: it is an array"),
        ("env = ['A=b']\n", "shop.toml:1:7: env: it is a table"),
        ("[env]\nA = 1\n", "shop.toml:2:5: env: the value of A"),
        ("name = 'a'\nname = 'b'\n", "shop.toml:2:1: duplicate key"),
        ("name = \n", "shop.toml:1:8: "),
    ] {
        let said = with_config(text, &["--", "p"]).expect_err(text);
        assert!(said.contains(want), "{text}: {said}");
    }
    assert!(refused(&["--config", "/no/such.toml", "--", "p"]).contains("/no/such.toml: No such file"));
    assert!(refused(&["install-unit", "n", "--config", "/no/such.toml", "--", "p"]).contains("/no/such.toml"));
    assert!(refused(&["install-unit", "n", "--config", "/dev/null"]).contains("PROGRAM"));
}

#[test]
fn times_and_sizes() {
    let ms = |text| parse_duration(text).map(|d| d.as_millis());
    assert_eq!(ms("500ms"), Ok(500));
    assert_eq!(ms("1s"), Ok(1000));
    assert_eq!(ms("1.5 m"), Ok(90_000));
    assert_eq!(ms("2h"), Ok(7_200_000));
    for bad in ["", "s", "-1s", "1x", "1e9s", "1.2.3s", "99999999999999999999999h", "ü"] {
        assert!(parse_duration(bad).is_err(), "{bad}");
    }
    assert_eq!(parse_size("4096"), Ok(4096));
    assert_eq!(parse_size("64MiB"), Ok(64 << 20));
    assert_eq!(parse_size("1.5k"), Ok(1536));
    assert_eq!(parse_size("2G"), Ok(2 << 30));
    for bad in ["", "MiB", "-1", "1MB", "1PiB", "9999999999TiB"] {
        assert!(parse_size(bad).is_err(), "{bad}");
    }
}

#[test]
fn default_names_are_good_names() {
    let name = |p: &str| default_name(&p.into(), 77);
    assert_eq!(name("redis-server"), "redis-server-77");
    assert_eq!(name("/usr/bin/python3.11"), "python3.11-77");
    assert_eq!(name("./my prog"), "my_prog-77");
    for odd in ["ü", "..", "/", "", &"x".repeat(200)] {
        assert!(check_name(&name(odd)).is_ok(), "{odd:?}: {}", name(odd));
    }
}

/// The manual page names every command and option, and nothing that is gone.
#[test]
fn the_manual_page_is_complete() {
    let page = include_str!("../../../man/ftrun.1").replace("\\-", "-");
    let heading = |line: &str| page.lines().any(|l| l.starts_with(line));
    let mut root = Cli::command();
    root.build();
    let mut all: Vec<&clap::Command> = root.get_subcommands().filter(|c| !c.is_hide_set()).collect();
    for command in &all {
        let name = command.get_name();
        assert!(name == "help" || heading(&format!(".SS {name}")), "no .SS {name}");
    }
    all.push(&root);
    let options = all.iter().flat_map(|c| c.get_arguments()).filter(|a| !a.is_hide_set());
    let mut known: Vec<String> = options.filter_map(|a| Some(format!("--{}", a.get_long()?))).collect();
    known.sort();
    known.dedup();
    let words = page.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let mut used: Vec<&str> = words.filter(|w| w.len() > 2 && w.starts_with("--")).collect();
    used.sort_unstable();
    used.dedup();
    for option in &known {
        assert!(used.contains(&option.as_str()), "{option} is not in the page");
    }
    // The examples use options of redis-server too.
    for option in used.iter().filter(|o| !matches!(**o, "--port" | "--appendonly")) {
        assert!(known.contains(&(*option).to_owned()), "{option} is no option of ftrun");
    }
    for section in [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "OPTIONS",
        "\"EXIT STATUS\"",
        "FILES",
        "ENVIRONMENT",
        "EXAMPLES",
        "NOTES",
        "\"SEE ALSO\"",
    ] {
        assert!(heading(&format!(".SH {section}")), "no .SH {section}");
    }
}
