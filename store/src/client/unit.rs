//! The handle of a unit in a store elsewhere.
//!
//! Appends are sent without waiting for anything but room; what the service says of them comes later. After one that
//! was refused none is taken until the refusal has been told to the caller.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Shared, lock};
use crate::net::{Answer, Op, Request};
use crate::{
    BATCH_BYTES_MAX, Batch, CheckpointInfo, Collected, EachPage, Error, NewCheckpoint, PAGE_BYTES, Page, UnitName,
    UnitStore,
};

/// Records that may be under way, bytes.
const UNDER_WAY_MAX: u64 = 16 << 20;
/// Pages sent in one frame.
const PAGES_SENT: usize = 64;

type Call = Arc<dyn Fn() + Send + Sync>;

/// What comes in about a unit.
pub(super) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// SII of the next append.
    next: u64,
    acknowledged: u64,
    /// SII behind a batch that is under way, and its bytes.
    under_way: std::collections::VecDeque<(u64, u64)>,
    bytes: u64,
    /// An append was refused, or (for good) the connection is lost.
    failed: Option<(Error, bool)>,
    /// Nothing will be acknowledged for now.
    stuck: Option<Error>,
    notify: Option<Call>,
}

impl Watch {
    pub(super) fn new(next: u64, acknowledged: u64) -> Self {
        let under_way = std::collections::VecDeque::new();
        let state = State { next, acknowledged, under_way, bytes: 0, failed: None, stuck: None, notify: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        let call = state.notify.clone();
        drop(state);
        self.changed.notify_all();
        if let Some(call) = call {
            call();
        }
    }

    pub(super) fn acknowledge(&self, sii: u64) {
        self.change(|state| {
            state.acknowledged = state.acknowledged.max(sii);
            state.stuck = None;
            while let Some((_, bytes)) = state.under_way.pop_front_if(|(next, _)| *next <= sii) {
                state.bytes -= bytes;
            }
        });
    }

    pub(super) fn fail(&self, error: &Error, for_good: bool) {
        self.change(|state| {
            if !state.failed.as_ref().is_some_and(|(_, good)| *good) {
                state.failed = Some((error.clone(), for_good));
            }
        });
    }

    pub(super) fn stuck(&self, error: &Error) {
        self.change(|state| state.stuck = Some(error.clone()));
    }
}

/// A unit in a store elsewhere.
pub(super) struct Remote {
    shared: Arc<Shared>,
    name: UnitName,
    handle: u32,
    epoch: u64,
    watch: Arc<Watch>,
    writes: bool,
    /// Held from checking the order of an append until it is on its way.
    sending: Mutex<()>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({}, epoch {})", self.name, self.epoch)
    }
}

impl Remote {
    pub(super) fn new(
        shared: Arc<Shared>,
        name: UnitName,
        handle: u32,
        epoch: u64,
        watch: Arc<Watch>,
        writes: bool,
    ) -> Self {
        Self { shared, name, handle, epoch, watch, writes, sending: Mutex::new(()) }
    }

    /// Tells the caller of a refused append, once; appending can go on behind what is stored then.
    fn tell(&self) -> Result<(), Error> {
        let failed = lock(&self.watch.state).failed.clone();
        let Some((error, for_good)) = failed else { return Ok(()) };
        if !for_good && !error.is_fenced() && !matches!(error, Error::Poisoned { .. }) {
            let (answer, _) = self.shared.call(Op::Resume { handle: self.handle }, &[])?;
            let Answer::Log(log) = answer else { return Err(self.shared.odd()) };
            let mut state = lock(&self.watch.state);
            state.next = log.end;
            while let Some((_, bytes)) = state.under_way.pop_back_if(|(next, _)| *next > log.end) {
                state.bytes -= bytes;
            }
            state.failed = None;
        }
        Err(error)
    }

    fn moved(&self) -> Result<(), Error> {
        let log = self.log()?;
        let mut state = lock(&self.watch.state);
        state.next = log.end;
        state.acknowledged = state.acknowledged.min(log.end).max(log.start);
        Ok(())
    }

    fn send_pages(&self, id: u64, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        let mut part: Vec<u8> = Vec::new();
        let send = |part: &mut Vec<u8>| {
            let sent = self.shared.send(&Request { id, op: Op::PutPages }, part);
            part.clear();
            sent
        };
        new.pages.each(&mut |address, page| {
            part.extend_from_slice(&address.to_le_bytes());
            part.extend_from_slice(page);
            if part.len() >= PAGES_SENT * (8 + PAGE_BYTES) { send(&mut part) } else { Ok(()) }
        })?;
        if part.is_empty() { Ok(()) } else { send(&mut part) }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        lock(&self.shared.inbox).units.remove(&self.handle);
        // The service forgets it with the connection, too.
        let _ = self.shared.send(&Request { id: 0, op: Op::Close { handle: self.handle } }, &[]);
    }
}

impl UnitStore for Remote {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn log(&self) -> Result<Range<u64>, Error> {
        match self.shared.call(Op::Log { handle: self.handle }, &[])? {
            (Answer::Log(log), _) => Ok(log),
            _ => Err(self.shared.odd()),
        }
    }

    fn append(&self, batch: Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        if !self.writes {
            return Err(Error::ReadOnly { unit: self.name.to_string() });
        }
        if batch.body().len() > BATCH_BYTES_MAX {
            let why = format!("{} bytes, and at most {BATCH_BYTES_MAX} go into one; make several", batch.body().len());
            return Err(Error::invalid("a batch of records", why));
        }
        let _sending = lock(&self.sending);
        self.tell()?;
        let bytes = batch.body().len() as u64;
        {
            let mut state = lock(&self.watch.state);
            if batch.first() != state.next {
                let expected = state.next;
                drop(state);
                // An empty log may skip.
                let log = self.log()?;
                if !log.is_empty() || batch.first() < log.end {
                    return Err(Error::OutOfOrder { unit: self.name.to_string(), expected, got: batch.first() });
                }
                state = lock(&self.watch.state);
            }
            while state.bytes > 0 && state.bytes + bytes > UNDER_WAY_MAX && state.failed.is_none() {
                if let Some(e) = &state.stuck {
                    return Err(e.clone());
                }
                state = self.watch.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.next = batch.next();
            state.bytes += bytes;
            state.under_way.push_back((batch.next(), bytes));
        }
        let op = Op::Append { handle: self.handle, first: batch.first(), count: batch.count() };
        self.shared.send(&Request { id: 0, op }, batch.body())?;
        Ok(())
    }

    fn acknowledged(&self) -> Result<u64, Error> {
        let (acknowledged, next, stuck) = {
            let state = lock(&self.watch.state);
            (state.acknowledged, state.next, state.stuck.clone())
        };
        if acknowledged < next {
            self.tell()?;
            if let Some(e) = stuck {
                return Err(e);
            }
        }
        Ok(acknowledged)
    }

    fn wait(&self, sii: u64, timeout: Duration) -> Result<(), Error> {
        let end = Instant::now().checked_add(timeout);
        let mut state = lock(&self.watch.state);
        while state.acknowledged <= sii {
            if state.failed.is_some() {
                drop(state);
                self.tell()?;
                state = lock(&self.watch.state);
                continue;
            }
            if let Some(e) = &state.stuck {
                return Err(e.clone());
            }
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Error::Timeout { unit: self.name.to_string(), sii });
            }
            state = self.watch.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn notify(&self, call: Box<dyn Fn() + Send + Sync>) {
        lock(&self.watch.state).notify = Some(Arc::from(call));
    }

    fn read(&self, from: u64, bytes_max: usize) -> Result<Vec<Batch>, Error> {
        let op = Op::Read { handle: self.handle, from, bytes_max: bytes_max as u64 };
        let (Answer::Batches(heads), bytes) = self.shared.call(op, &[])? else { return Err(self.shared.odd()) };
        let mut rest = &bytes[..];
        let mut batches = Vec::with_capacity(heads.len());
        for (first, count, len) in heads {
            let (body, behind) = rest.split_at_checked(len as usize).ok_or_else(|| self.shared.odd())?;
            batches.push(Batch::parse(first, count, body.to_vec())?);
            rest = behind;
        }
        Ok(batches)
    }

    fn truncate_below(&self, sii: u64) -> Result<(), Error> {
        self.shared.done(Op::TruncateBelow { handle: self.handle, sii })?;
        let mut state = lock(&self.watch.state);
        if sii > state.next {
            (state.next, state.acknowledged) = (sii, sii);
        }
        Ok(())
    }

    fn truncate_from(&self, sii: u64) -> Result<(), Error> {
        let _sending = lock(&self.sending);
        self.shared.done(Op::TruncateFrom { handle: self.handle, sii })?;
        self.moved()
    }

    fn collect(&self, recovery: u64, spare: usize) -> Result<Collected, Error> {
        let op = Op::Collect { handle: self.handle, recovery, spare: spare as u64 };
        match self.shared.call(op, &[])? {
            (Answer::Collected(collected), _) => Ok(collected),
            _ => Err(self.shared.odd()),
        }
    }

    fn put_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        let id = self.shared.id();
        let reply = self.shared.expect(id)?;
        let op = Op::Put { handle: self.handle, sii: new.sii, parent: new.parent, gone: new.gone.to_vec() };
        self.shared.send(&Request { id, op }, new.manifest)?;
        let sent = self.send_pages(id, new);
        self.shared.send(&Request { id, op: Op::PutEnd { whole: sent.is_ok() } }, &[])?;
        let reply = self.shared.wait(&reply);
        sent?;
        match reply? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.shared.odd()),
        }
    }

    fn checkpoints(&self) -> Result<Vec<CheckpointInfo>, Error> {
        match self.shared.call(Op::Checkpoints { handle: self.handle }, &[])? {
            (Answer::Checkpoints(infos), _) => Ok(infos),
            _ => Err(self.shared.odd()),
        }
    }

    fn manifest(&self, sii: u64) -> Result<Vec<u8>, Error> {
        match self.shared.call(Op::Manifest { handle: self.handle, sii }, &[])? {
            (Answer::Manifest, bytes) => Ok(bytes),
            _ => Err(self.shared.odd()),
        }
    }

    fn pages(&self, sii: u64, mut range: Range<u64>, each: &mut EachPage<'_>) -> Result<(), Error> {
        loop {
            let op = Op::Pages { handle: self.handle, sii, range: range.clone() };
            let (Answer::Pages { pages, next }, bytes) = self.shared.call(op, &[])? else {
                return Err(self.shared.odd());
            };
            let mut contents = bytes.as_chunks::<PAGE_BYTES>().0.iter();
            for (address, stored) in pages {
                let page: Option<&Page> =
                    if stored { Some(contents.next().ok_or_else(|| self.shared.odd())?) } else { None };
                each(address, page)?;
            }
            match next {
                Some(next) if next > range.start => range.start = next,
                _ => return Ok(()),
            }
        }
    }

    fn renew(&self) -> Result<(), Error> {
        self.shared.done(Op::Renew { handle: self.handle })
    }

    fn release(&self) -> Result<(), Error> {
        self.tell()?;
        self.shared.done(Op::Release { handle: self.handle })
    }
}
