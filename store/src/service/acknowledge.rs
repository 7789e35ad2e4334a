//! Acknowledgements: who commits sends them, where that needs nobody else.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::socket::{self, MsgFlags};
use tokio::sync::Notify;

use super::lock;
use crate::Error;
use crate::engine::Handle;
use crate::net::{Response, encode};

/// A unit that this connection has open.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) store: Arc<Handle>,
    pub(super) memory: bool,
    /// An append failed, and the client has not said that it knows.
    pub(super) failed: AtomicBool,
    /// It is among those whose acknowledgements are to be sent.
    dirty: AtomicBool,
}

/// What both tasks and whoever commits share.
#[derive(Debug, Default)]
pub(super) struct Handles {
    pub(super) units: Mutex<HashMap<u32, Arc<Open>>>,
    dirty: Mutex<Vec<u32>>,
    pub(super) wake: Notify,
    pub(super) direct: Mutex<Direct>,
}

/// The way around the task that writes.
#[derive(Debug, Default)]
pub(super) struct Direct {
    /// The socket, if what is sent is not sealed.
    pub(super) socket: Option<OwnedFd>,
    /// The task writes.
    pub(super) busy: bool,
    /// What the socket has not taken; it goes first.
    pub(super) rest: Vec<u8>,
}

impl Open {
    pub(super) fn new(store: Arc<Handle>, memory: bool) -> Self {
        Self { store, memory, failed: AtomicBool::new(false), dirty: AtomicBool::new(false) }
    }
}

impl Handles {
    pub(super) fn get(&self, handle: u32) -> Result<Arc<Open>, Error> {
        let found = lock(&self.units).get(&handle).cloned();
        found.ok_or_else(|| Error::invalid(format!("handle {handle}"), "nothing was opened under it"))
    }

    /// Takes note that there are acknowledgements to be sent; true if there were none before: then the caller has to see to it
    /// that they are.
    pub(super) fn ask(&self, handle: u32, unit: &Open) -> bool {
        if unit.dirty.swap(true, Ordering::SeqCst) {
            return false;
        }
        let mut dirty = lock(&self.dirty);
        dirty.push(handle);
        dirty.len() == 1
    }

    /// Puts what is to be said of acknowledgements into `out`.
    pub(super) fn acknowledgements(&self, out: &mut Vec<u8>) {
        let handles = std::mem::take(&mut *lock(&self.dirty));
        let units: Vec<(u32, Arc<Open>)> = {
            let units = lock(&self.units);
            handles.iter().filter_map(|handle| Some((*handle, Arc::clone(units.get(handle)?)))).collect()
        };
        units.iter().for_each(|(_, unit)| unit.dirty.store(false, Ordering::SeqCst));
        let mut all = Vec::new();
        let found = Handle::acknowledged_all(units.iter().map(|(_, unit)| &*unit.store));
        for ((handle, _), acknowledged) in units.into_iter().zip(found) {
            match acknowledged {
                Ok(sii) => all.push((handle, sii)),
                Err(error) if error.is_full() => encode(out, &Response::Stuck { handle, error }, &[]),
                Err(error) => encode(out, &Response::AppendFailed { handle, error }, &[]),
            }
        }
        if !all.is_empty() {
            encode(out, &Response::Acknowledged(all), &[]);
        }
    }

    /// Sends acknowledgements at once, if nothing is on its way; else the task does. Does not wait.
    pub(super) fn acknowledge(&self) {
        let mut direct = lock(&self.direct);
        let Direct { socket: Some(socket), busy: false, rest } = &mut *direct else {
            self.wake.notify_one();
            return;
        };
        if rest.is_empty() {
            self.acknowledgements(rest);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            // What is wrong with the connection is found by those who read and write.
            let sent = if rest.is_empty() { 0 } else { socket::send(socket.as_raw_fd(), rest, flags).unwrap_or(0) };
            rest.drain(..sent);
        }
        if !rest.is_empty() {
            self.wake.notify_one();
        }
    }
}

/// Connections that have acknowledgements to send.
#[derive(Debug, Default)]
pub(super) struct Ready(Mutex<Vec<Arc<Handles>>>);

impl Ready {
    /// Another connection has some.
    pub(super) fn add(&self, handles: Arc<Handles>) {
        lock(&self.0).push(handles);
    }

    /// Sends them. Called by whoever commits.
    pub(super) fn acknowledge(&self) {
        let all = std::mem::take(&mut *lock(&self.0));
        all.iter().for_each(|handles| handles.acknowledge());
    }
}
