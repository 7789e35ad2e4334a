//! Unit files (systemd.unit(5), systemd.service(5), systemd.socket(5)).

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::report::Error;

/// Every unit is an instance of it.
const TEMPLATE: &str = include_str!("../../systemd/ftrun@.service");
/// First words of the part of the template that only the system's service manager can do.
const SANDBOX: &str = "# The sandbox";
const TEMPLATE_NAME: &str = "ftrun@.service";

/// Which service manager a unit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The system's.
    System,
    /// That of the user.
    User,
}

/// What a service is made of.
#[derive(Debug)]
pub struct Service {
    /// Name of the unit.
    pub name: String,
    /// Which service manager it is for.
    pub scope: Scope,
    /// Absolute path of `ftrun`.
    pub ftrun: PathBuf,
    /// Options for `ftrun run`, without `--name`.
    pub options: Vec<std::ffi::OsString>,
    /// The program and its arguments.
    pub command: Vec<std::ffi::OsString>,
    /// User that it runs as.
    pub user: Option<String>,
    /// Directory below `/var/lib` that is made for it.
    pub state_directory: Option<String>,
    /// Addresses of sockets that are handed over.
    pub listen: Vec<String>,
}

/// A file to be.
#[derive(Debug, PartialEq, Eq)]
pub struct UnitFile {
    /// Its path below the directory of unit files.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// It is the same for every unit: one that is there may be somebody's own.
    pub shared: bool,
}

impl Service {
    /// Name of the service.
    pub fn service(&self) -> String {
        format!("ftrun@{}.service", self.name)
    }

    /// Name of what is to be enabled.
    pub fn enable(&self) -> String {
        if self.listen.is_empty() { self.service() } else { format!("ftrun@{}.socket", self.name) }
    }

    /// The files of the service.
    ///
    /// # Errors
    /// Something cannot be said in a unit file.
    pub fn files(&self) -> Result<Vec<UnitFile>, Error> {
        let template = UnitFile { path: TEMPLATE_NAME.into(), text: template(self.scope), shared: true };
        let path = Path::new(&format!("{}.d", self.service())).join("command.conf");
        let mut files = vec![template, UnitFile { path, text: self.command_text()?, shared: false }];
        if !self.listen.is_empty() {
            let mut text = format!("[Unit]\nDescription=Sockets of {}\n\n[Socket]\n", self.name);
            for address in &self.listen {
                let _infallible = writeln!(text, "ListenStream={}", listen_address(address)?);
            }
            text.push_str("\n[Install]\nWantedBy=sockets.target\n");
            files.push(UnitFile { path: self.enable().into(), text, shared: false });
        }
        Ok(files)
    }

    fn command_text(&self) -> Result<String, Error> {
        let mut text =
            String::from("# Written by `ftrun install-unit`; another one for this name replaces it.\n[Service]\n");
        if let Some(user) = &self.user {
            let _infallible = writeln!(text, "User={user}");
        }
        if let Some(directory) = &self.state_directory {
            let _infallible = writeln!(text, "StateDirectory={directory}");
        }
        let _infallible =
            write!(text, "ExecStart=\nExecStart={} run --resume --name=%i", quote(self.ftrun.as_os_str(), false)?);
        for option in &self.options {
            let _infallible = write!(text, " {}", word(option)?);
        }
        text.push_str(" --");
        for argument in &self.command {
            let _infallible = write!(text, " {}", word(argument)?);
        }
        text.push('\n');
        Ok(text)
    }
}

fn template(scope: Scope) -> String {
    match scope {
        Scope::System => TEMPLATE.to_owned(),
        Scope::User => {
            let paragraphs = TEMPLATE.split("\n\n").filter(|p| !p.starts_with(SANDBOX));
            paragraphs.collect::<Vec<_>>().join("\n\n").replace("multi-user.target", "default.target")
        }
    }
}

fn listen_address(address: &str) -> Result<String, Error> {
    if address.is_empty() || address.chars().any(|c| c.is_control() || c.is_whitespace()) {
        let hint = "write a port, HOST:PORT, a path, or @NAME (ListenStream= of systemd.socket(5))";
        return Err(Error::environment(format!("{address:?} is no address to listen at"), hint));
    }
    Ok(address.replace('%', "%%"))
}

/// One word of a command line, as the service manager reads it.
///
/// # Errors
/// It is not UTF-8: unit files are.
pub fn word(text: &OsStr) -> Result<String, Error> {
    quote(text, true)
}

/// `variables` says that `$` begins a variable there: everywhere but in the path of what is executed.
fn quote(text: &OsStr, variables: bool) -> Result<String, Error> {
    let text = text.to_str().ok_or_else(|| {
        let hint = "give the program a script of its own, and run that";
        Error::environment(format!("{} is not UTF-8, and cannot be written to a unit file", text.display()), hint)
    })?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            // A specifier, wherever it stands.
            '%' => quoted.push_str("%%"),
            '$' if variables => quoted.push_str("$$"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_ascii_control() => {
                let _infallible = write!(quoted, "\\x{:02x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    Ok(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    /// What a real systemd makes of such words, `tests/tests/systemd.rs` shows.
    #[test]
    fn words_are_quoted() {
        let word = |text: &str| word(OsStr::new(text)).unwrap();
        for plain in ["--port=7000", "/usr/bin/x", "a,b:c@d+e_f.g"] {
            assert_eq!(word(plain), plain);
        }
        assert_eq!(word(""), r#""""#);
        assert_eq!(word("two words"), r#""two words""#);
        assert_eq!(word(r#"say "it's" \o/"#), r#""say \"it's\" \\o/""#);
        assert_eq!(word("100% $HOME ${A} $"), r#""100%% $$HOME $${A} $$""#);
        assert_eq!(word("a\nb\tc\x01\x7f"), r#""a\nb\tc\x01\x7f""#);
        assert_eq!(word(";"), r#"";""#);
        assert_eq!(word("ü"), r#""ü""#);
        assert_eq!(quote(OsStr::new("/opt/my $ dir"), false).unwrap(), r#""/opt/my $ dir""#);
        assert!(super::word(&OsString::from_vec(vec![0xff])).is_err());
    }

    fn service() -> Service {
        Service {
            name: "shop".into(),
            scope: Scope::System,
            ftrun: "/usr/bin/ftrun".into(),
            options: vec!["--durability=supervisor".into()],
            command: vec!["/bin/echo".into(), "50%".into()],
            user: None,
            state_directory: Some("ftrun".into()),
            listen: vec![],
        }
    }

    #[test]
    fn a_service_is_an_instance_of_the_template() {
        let files = service().files().unwrap();
        assert_eq!(files.len(), 2);
        assert_eq!(files[0].text, TEMPLATE);
        assert_eq!(files[1].path, Path::new("ftrun@shop.service.d/command.conf"));
        let line = r#"ExecStart=/usr/bin/ftrun run --resume --name=%i --durability=supervisor -- /bin/echo "50%%""#;
        assert!(files[1].text.ends_with(&format!("StateDirectory=ftrun\nExecStart=\n{line}\n")), "{}", files[1].text);
        let user = Service { scope: Scope::User, ..service() };
        let text = &user.files().unwrap()[0].text;
        assert!(text.contains("WantedBy=default.target") && text.contains("KillMode=mixed"), "{text}");
        assert!(!text.contains("ProtectSystem"), "{text}");
    }

    #[test]
    fn sockets_have_a_file_of_their_own() {
        let listens = Service { listen: vec!["127.0.0.1:80".into(), "/run/x%y".into()], ..service() };
        let files = listens.files().unwrap();
        assert_eq!(files[2].path, Path::new("ftrun@shop.socket"));
        assert!(files[2].text.contains("ListenStream=127.0.0.1:80\nListenStream=/run/x%%y\n"), "{}", files[2].text);
        assert_eq!(
            (listens.enable().as_str(), service().enable().as_str()),
            ("ftrun@shop.socket", "ftrun@shop.service")
        );
        for bad in ["", "80\nExec=x", "a b"] {
            assert!(Service { listen: vec![bad.into()], ..service() }.files().is_err(), "{bad:?}");
        }
    }
}
