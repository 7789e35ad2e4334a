//! What happens in a run, told line by line.

use crate::protocols::machine::{Action, Event, Machine};

/// A run as it is told.
#[derive(Clone, Debug)]
pub(super) struct Tale {
    names: Vec<String>,
    lines: Vec<String>,
    /// What has just happened, if it is not worth a line by itself.
    unsaid: Option<String>,
}

impl Tale {
    pub(super) fn of<'a, M: Machine + 'a>(machines: impl Iterator<Item = &'a M>) -> Self {
        let names = machines.enumerate().map(|(node, machine)| match machine.role() {
            "unit" => format!("unit {node}"),
            role => role.to_owned(),
        });
        Self { names: names.collect(), lines: Vec::new(), unsaid: None }
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines
    }

    /// Something happens to a node, at a time if there is one.
    pub(super) fn event<P: std::fmt::Display>(&mut self, now: Option<u64>, node: usize, event: &Event<P>) {
        let when = now.map_or(String::new(), |now| format!("{:>9.3} ms  ", now as f64 / 1e3));
        let name = &self.names[node];
        self.unsaid = None;
        let line = match event {
            Event::Packet { from, packet } => format!("{when}{name} ← {}: {packet}", self.names[*from]),
            Event::Start => format!("{when}{name} starts"),
            Event::Timer(_) => {
                self.unsaid = Some(format!("{when}{name}: a timer runs out"));
                return;
            }
            Event::Written(token) => format!("{when}{name}: write {token} is done"),
            Event::Restarted { shown } => format!("{when}{name} RUNS AGAIN; the world has taken {shown} outputs of it"),
            Event::Down(other) => format!("{when}{name} learns that {} is down", self.names[*other]),
        };
        self.lines.push(line);
    }

    /// A node wants something done.
    pub(super) fn action<P: std::fmt::Display>(&mut self, action: &Action<P>) {
        let line = match action {
            Action::Send { to, packet } => format!("→ {}: {packet}", self.names[*to]),
            Action::Timer { .. } => return,
            Action::Write { token, bytes } => format!("writes {bytes} bytes (write {token})"),
            Action::Show(output) => format!("SHOWS {output}"),
            Action::Restart(node) => format!("restarts {}", self.names[*node]),
            Action::Unrecoverable => "GIVES UP: no consistent state can be recovered".to_owned(),
        };
        self.lines.extend(self.unsaid.take());
        self.lines.push(format!("                  {line}"));
    }

    /// A node fails; these of its writes are done.
    pub(super) fn failure(&mut self, now: Option<u64>, node: usize, written: &[u64]) {
        let when = now.map_or(String::new(), |now| format!("{:>9.3} ms  ", now as f64 / 1e3));
        let writes = match written {
            [] => String::new(),
            some => format!("; writes {some:?} have reached its disk"),
        };
        self.lines.push(format!("{when}{} FAILS{writes}", self.names[node]));
    }
}
