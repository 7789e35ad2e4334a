//! `ftrun install-unit`: writes the files of a service, and says what to do next.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{User, geteuid};

use super::unit_file::{Scope, Service, UnitFile};
use crate::report::Error;
use crate::unitdir::check_name;

/// Where an administrator's unit files are (systemd.unit(5)).
const SYSTEM_DIR: &str = "/etc/systemd/system";

/// What was asked for.
#[derive(Debug)]
pub struct Request {
    /// Name of the unit.
    pub name: String,
    /// For the user's own service manager.
    pub user_manager: bool,
    /// User that it runs as.
    pub user: Option<String>,
    /// Addresses of sockets to be handed over.
    pub listen: Vec<String>,
    /// Print the files, and write none.
    pub print: bool,
    /// Replace a template that differs.
    pub force: bool,
    /// Directory of unit files, instead of the service manager's.
    pub dir: Option<PathBuf>,
    /// State directory, if one was named.
    pub state_dir: Option<PathBuf>,
    /// Other options for `ftrun run`.
    pub options: Vec<OsString>,
    /// The program and its arguments.
    pub command: Vec<OsString>,
}

/// Writes a service's files; what was done goes to `out`.
///
/// # Errors
/// A name, program or user that will not do; the directory cannot be written to.
pub fn install(request: Request, out: &mut impl Write) -> Result<(), Error> {
    let scope = if request.user_manager { Scope::User } else { Scope::System };
    let dir = match &request.dir {
        Some(dir) => std::path::absolute(dir).map_err(Error::state("find", dir))?,
        None => unit_dir(scope)?,
    };
    if scope == Scope::System && request.dir.is_none() && !request.print && !geteuid().is_root() {
        let hint = "write one for yourself with --user, or see with --print what root would write";
        return Err(Error::environment("only root writes unit files for the system's service manager", hint));
    }
    let (print, force) = (request.print, request.force);
    let service = service(request, scope)?;
    let files = service.files()?;
    let say = |out: &mut dyn Write, text: String| out.write_all(text.as_bytes()).map_err(Error::Output);
    if print {
        for (i, file) in files.iter().enumerate() {
            let between = if i == 0 { "" } else { "\n" };
            say(out, format!("{between}# {}\n{}", dir.join(&file.path).display(), file.text))?;
        }
        return Ok(());
    }
    for file in &files {
        let done = put(&dir, file, force)?;
        say(out, format!("{done} {}\n", dir.join(&file.path).display()))?;
    }
    let systemctl = if scope == Scope::User { "systemctl --user" } else { "systemctl" };
    say(out, format!("next:\n  {systemctl} daemon-reload\n  {systemctl} enable --now {}\n", service.enable()))?;
    if scope == Scope::User {
        say(out, "  loginctl enable-linger        # to have it run while you are not logged in\n".into())?;
    }
    Ok(())
}

fn unit_dir(scope: Scope) -> Result<PathBuf, Error> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    match scope {
        Scope::System => Ok(SYSTEM_DIR.into()),
        Scope::User => variable("XDG_CONFIG_HOME")
            .or_else(|| Some(variable("HOME")?.join(".config")))
            .map(|config| config.join("systemd/user"))
            .ok_or_else(|| {
                let what = "there is no place for unit files: neither XDG_CONFIG_HOME nor HOME is set";
                Error::environment(what, "name one with --dir DIR")
            }),
    }
}

fn service(request: Request, scope: Scope) -> Result<Service, Error> {
    let Request { name, user, listen, state_dir, mut options, mut command, .. } = request;
    check_name(&name).map_err(|e| Error::environment(format!("bad unit name {name:?}: {e}"), ""))?;
    if let Some(user) = &user {
        if scope == Scope::User {
            let what = "--as is for the system's service manager: your own runs services as you";
            return Err(Error::environment(what, "leave out --user"));
        }
        if !User::from_name(user).is_ok_and(|u| u.is_some()) {
            return Err(Error::environment(format!("there is no user {user}"), ""));
        }
    }
    if let Some(program) = command.first_mut() {
        // The service manager's search path is another one.
        let path = crate::run::find(program)?;
        let path = fs::metadata(&path).and_then(|_| std::path::absolute(&path));
        *program = path.map_err(|e| crate::run::exec_error(&program.to_string_lossy(), &e))?.into();
    }
    let ftrun = std::env::current_exe().map_err(|e| Error::bug(format!("the path of ftrun: {e}")))?;
    // `/var/lib/ftrun` is root's; the manager makes it, or another user's, before it starts the service.
    let state_directory = (scope == Scope::System && state_dir.is_none())
        .then(|| user.as_ref().filter(|u| *u != "root").map_or("ftrun".into(), |user| format!("ftrun-{user}")));
    let state_dir = match (&state_directory, state_dir) {
        (Some(directory), _) => Path::new("/var/lib").join(directory),
        (None, dir) => crate::cli::state_dir(dir)?,
    };
    options.insert(0, {
        let mut option = OsString::from("--state-dir=");
        option.push(state_dir);
        option
    });
    Ok(Service { name, scope, ftrun, options, command, user, state_directory, listen })
}

/// Writes a file, as a whole; says what was done.
fn put(dir: &Path, file: &UnitFile, force: bool) -> Result<&'static str, Error> {
    let path = dir.join(&file.path);
    let done = match fs::read_to_string(&path) {
        Ok(text) if text == file.text => return Ok("unchanged:"),
        Ok(_) if file.shared && !force => return Ok("kept, although it differs from that of this ftrun (--force):"),
        Ok(_) => "replaced",
        Err(e) if e.kind() == io::ErrorKind::NotFound => "wrote",
        Err(e) => return Err(Error::state("read", &path)(e)),
    };
    let parent = path.parent().unwrap_or(dir);
    fs::create_dir_all(parent).map_err(Error::state("create", parent))?;
    let mut fresh = path.clone().into_os_string();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    fs::write(&fresh, &file.text).map_err(Error::state("write", &fresh))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o644)).map_err(Error::state("write", &fresh))?;
    fs::rename(&fresh, &path).map_err(Error::state("write", &path))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(dir: &Path) -> Request {
        Request {
            name: "shop".into(),
            user_manager: false,
            user: None,
            listen: vec![],
            print: false,
            force: false,
            dir: Some(dir.to_owned()),
            state_dir: None,
            options: vec!["--no-shim".into()],
            command: vec!["sh".into(), "-c".into(), "exit 3".into()],
        }
    }

    fn said(request: Request) -> Result<String, Error> {
        let mut out = Vec::new();
        install(request, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn files_are_written_and_the_next_steps_said() {
        let dir = tempfile::tempdir().unwrap();
        let text = said(request(dir.path())).unwrap();
        assert!(text.contains("wrote ") && text.contains("systemctl enable --now ftrun@shop.service"), "{text}");
        let command = dir.path().join("ftrun@shop.service.d/command.conf");
        let first = fs::read_to_string(&command).unwrap();
        assert!(first.contains(" --state-dir=/var/lib/ftrun --no-shim -- /"), "{first}");
        assert!(first.contains("StateDirectory=ftrun\n"), "{first}");

        assert_eq!(said(request(dir.path())).unwrap().matches("unchanged:").count(), 2);
        let template = dir.path().join("ftrun@.service");
        fs::write(&template, "# my own\n").unwrap();
        let other = Request { command: vec!["/bin/true".into()], ..request(dir.path()) };
        let text = said(other).unwrap();
        assert!(text.contains("kept, ") && text.contains("replaced "), "{text}");
        assert_eq!(fs::read_to_string(&template).unwrap(), "# my own\n");
        said(Request { force: true, ..request(dir.path()) }).unwrap();
        assert_ne!(fs::read_to_string(&template).unwrap(), "# my own\n");
    }

    #[test]
    fn what_is_printed_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let text = said(Request { print: true, listen: vec!["7000".into()], ..request(dir.path()) }).unwrap();
        assert!(text.starts_with("# ") && text.contains("ListenStream=7000"), "{text}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn refusals() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |request| said(request).unwrap_err().to_string();
        for name in ["a/b", "", "..", "a b", "x@y", "%i"] {
            let said = refused(Request { name: name.into(), ..request(dir.path()) });
            assert!(said.contains("bad unit name"), "{name}: {said}");
        }
        let nobody = Request { user: Some("no-such-user".into()), ..request(dir.path()) };
        assert!(refused(nobody).contains("no user no-such-user"));
        let both = Request { user: Some("root".into()), user_manager: true, ..request(dir.path()) };
        assert!(refused(both).contains("--as"));
        let missing = Request { command: vec!["no-such-program".into()], ..request(dir.path()) };
        assert!(refused(missing).contains("no such program"));
        let missing = Request { command: vec!["/no/such/program".into()], ..request(dir.path()) };
        assert!(refused(missing).contains("/no/such/program"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
