//! Log lines to standard error.
//!
//! The tracer's thread shares its descriptor table with the unit, so descriptor 2 there is the
//! program's. Every line therefore goes over a channel to a thread that writes it to a duplicate of
//! the standard error that ftrun was started with. Until that thread runs (in the keeper it never
//! does) lines are written directly.
//!
//! A panic message takes the same way.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for the thread at most; then the sender waits.
const QUEUE_LINES: usize = 65536;
/// Our duplicate of standard error gets a number from here on, out of the program's way.
pub const FD_MIN: i32 = 100;

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Number of our duplicate of the standard error that ftrun was started with, -1 for none.
static STDERR: AtomicI32 = AtomicI32::new(-1);
/// Channel to the logging thread. What it points to is never freed: a fork may have copied it in
/// any state.
static CHANNEL: AtomicPtr<SyncSender<Message>> = AtomicPtr::new(ptr::null_mut());

fn channel() -> Option<&'static SyncSender<Message>> {
    let sender = CHANNEL.load(Ordering::Acquire);
    // SAFETY: the pointer is null or came from `Box::leak`, so what it points to lives for ever; it
    // is only used by shared reference, which `SyncSender: Sync` allows from every thread.
    unsafe { sender.as_ref() }
}

/// Sets up logging for this process: warnings only, or more with `verbose` 1 (info), 2 (debug), 3
/// (trace). Call once, before any thread or child.
pub fn init(verbose: u8, json: bool) {
    if let Ok(fd) = fcntl(io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(FD_MIN)) {
        STDERR.store(fd, Ordering::Release);
    }
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let builder =
        tracing_subscriber::fmt().with_max_level(level).with_writer(Sink).with_ansi(io::stderr().is_terminal());
    let set = if json {
        tracing::subscriber::set_global_default(builder.json().finish())
    } else {
        tracing::subscriber::set_global_default(builder.finish())
    };
    if set.is_err() {
        tracing::debug!("logging was set up before");
    }
    std::panic::set_hook(Box::new(|info| {
        line(format!("ftrun: internal error: {info}\n").into_bytes());
        flush();
    }));
}

/// Starts the logging thread in this process; again after a fork, which does not copy it. Start it
/// from a thread with ftrun's own descriptor table.
pub fn start_thread() -> io::Result<()> {
    let (sender, lines) = sync_channel(QUEUE_LINES);
    thread::Builder::new().name("ftrun-log".into()).spawn(move || write_lines(&lines))?;
    CHANNEL.store(Box::leak(Box::new(sender)), Ordering::Release);
    Ok(())
}

fn write_lines(lines: &Receiver<Message>) {
    if let Err(e) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None) {
        write_stderr(format!("ftrun: cannot block signals in the logging thread: {e}\n").as_bytes());
    }
    for message in lines {
        match message {
            Message::Line(bytes) => write_stderr(&bytes),
            Message::Flush(done) => drop(done.send(())),
        }
    }
}

fn write_stderr(bytes: &[u8]) {
    if let Some(fd) = stderr_fd() {
        // SAFETY: the number is ours, here as in the table of the thread that writes lines; it is not closed.
        let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
        // There is nobody to tell when standard error fails.
        drop(file.write_all(bytes));
    }
}

/// Writes one line as it is, whatever the log level.
pub fn line(bytes: Vec<u8>) {
    match channel() {
        Some(channel) => drop(channel.send(Message::Line(bytes))),
        None => write_stderr(&bytes),
    }
}

/// Waits until the lines so far are written, for a second at most. Call before the process ends.
pub fn flush() {
    if let Some(channel) = channel() {
        let (done, wait) = sync_channel(1);
        if channel.try_send(Message::Flush(done)).is_ok() {
            // The answer is all the same: the lines are written, or the wait is over.
            let _answer = wait.recv_timeout(Duration::from_secs(1));
        }
    }
}

/// Number of our duplicate of standard error, if there is one: it is not the program's.
pub fn stderr_fd() -> Option<i32> {
    Some(STDERR.load(Ordering::Acquire)).filter(|fd| *fd >= 0)
}

/// In a supervisor: our duplicate has another number in its table.
pub fn use_fd(fd: Option<i32>) {
    STDERR.store(fd.unwrap_or(-1), Ordering::Release);
}

/// Makes a [`Line`] for each event.
struct Sink;

/// Collects what is written and sends it as one line when dropped.
struct Line(Vec<u8>);

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        line(std::mem::take(&mut self.0));
    }
}
