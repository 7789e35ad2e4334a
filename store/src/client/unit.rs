//! The handle of a unit in a store elsewhere.
//!
//! Appends are sent without waiting for anything but room; what the service says of them comes later. After one that
//! was refused none is taken until the refusal has been told to the caller.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{ForPages, Need, Shared, UNREAD_MAX, lock};
use crate::net::{Answer, Op, Request};
use crate::watch::{Look, Watch};
use crate::{
    Batch, CheckpointInfo, Collected, EachPage, Error, NewCheckpoint, OpenOptions, PAGE_BYTES, Page, UnitName,
    UnitStore,
};

/// Pages sent in one frame.
const PAGES_SENT: usize = 64;

/// A unit in a store elsewhere.
pub(super) struct Remote {
    shared: Arc<Shared>,
    name: UnitName,
    handle: u32,
    epoch: u64,
    watch: Arc<Watch>,
    /// How it was opened; `None` for one that only reads.
    options: Option<OpenOptions>,
    pages: Arc<ForPages>,
    /// The connection for pages on which the unit was opened last, and its handle there.
    pages_handle: Mutex<Option<(Arc<Shared>, u32)>>,
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
        pages: Arc<ForPages>,
        name: UnitName,
        handle: u32,
        epoch: u64,
        watch: Arc<Watch>,
        options: Option<OpenOptions>,
    ) -> Self {
        let (pages_handle, sending) = (Mutex::default(), Mutex::default());
        Self { shared, name, handle, epoch, watch, options, pages, pages_handle, sending }
    }

    /// The connection for pages, and the unit's handle there.
    fn for_pages(&self) -> Result<(Arc<Shared>, u32), Error> {
        let connection = self.pages.connection(&self.shared)?;
        let mut known = lock(&self.pages_handle);
        if let Some((of, handle)) = &*known
            && Arc::ptr_eq(of, &connection)
        {
            return Ok((connection, *handle));
        }
        let (unit, epoch) = (self.name.clone(), self.epoch);
        let op = match self.options.clone() {
            Some(options) => Op::Join { unit, epoch, options },
            None => Op::View { unit },
        };
        let (Answer::Opened { handle, .. }, _) = connection.call(op, &[])? else { return Err(connection.odd()) };
        *known = Some((Arc::clone(&connection), handle));
        Ok((connection, handle))
    }

    /// Tells the caller of a refused append, once; appending can go on behind what is stored then.
    fn tell(&self) -> Result<(), Error> {
        let Some((error, for_good)) = self.watch.failure() else { return Ok(()) };
        if !for_good && !error.is_fenced() && !matches!(error, Error::Poisoned { .. }) {
            let (answer, _) = self.shared.call(Op::Resume { handle: self.handle }, &[])?;
            let Answer::Log(log) = answer else { return Err(self.shared.odd()) };
            self.watch.resume(log.end);
        }
        Err(error)
    }

    fn send_pages(connection: &Shared, id: u64, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        let mut part: Vec<u8> = Vec::new();
        let send = |part: &mut Vec<u8>| {
            let sent = connection.send(&Request { id, op: Op::PutPages }, part);
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
        if let Some((connection, handle)) = lock(&self.pages_handle).take() {
            let _ = connection.send(&Request { id: 0, op: Op::Close { handle } }, &[]);
        }
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
        if self.options.is_none() {
            return Err(Error::ReadOnly { unit: self.name.to_string() });
        }
        batch.check_size()?;
        let _sending = lock(&self.sending);
        if self.watch.batches() >= UNREAD_MAX {
            self.shared.drain();
        }
        if !self.watch.has_room(batch.body().len()) {
            self.shared.wait_for(&Need::Room(Arc::clone(&self.watch), batch.body().len()), None);
        }
        self.tell()?;
        self.watch.admit(&self.name, &batch, &|| self.log())?;
        let op = Op::Append { handle: self.handle, first: batch.first(), count: batch.count() };
        self.shared.send(&Request { id: 0, op }, batch.body())?;
        Ok(())
    }

    fn acknowledged(&self) -> Result<u64, Error> {
        self.shared.drain();
        self.watch.acknowledged(&|| self.tell())
    }

    fn wait(&self, sii: u64, timeout: Duration) -> Result<(), Error> {
        let end = Instant::now().checked_add(timeout);
        loop {
            match self.watch.look(sii) {
                Look::Acknowledged => return Ok(()),
                Look::Failed => self.tell()?,
                Look::Stuck(e) => return Err(e),
                Look::Waiting => {
                    if let Some(e) = self.shared.failure() {
                        return Err(e);
                    }
                    let need = Need::Record(Arc::clone(&self.watch), sii);
                    if !self.shared.wait_for(&need, end) {
                        return Err(Error::Timeout { unit: self.name.to_string(), sii });
                    }
                }
            }
        }
    }

    fn notify(&self, call: Box<dyn Fn() + Send + Sync>) {
        self.watch.notify(call);
        self.shared.listen();
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
        self.watch.skip_to(sii);
        Ok(())
    }

    fn truncate_from(&self, sii: u64) -> Result<(), Error> {
        let _sending = lock(&self.sending);
        self.shared.done(Op::TruncateFrom { handle: self.handle, sii })?;
        self.watch.settled(self.log()?.end);
        Ok(())
    }

    fn collect(&self, recovery: u64, spare: usize) -> Result<Collected, Error> {
        let op = Op::Collect { handle: self.handle, recovery, spare: spare as u64 };
        match self.shared.call(op, &[])? {
            (Answer::Collected(collected), _) => Ok(collected),
            _ => Err(self.shared.odd()),
        }
    }

    fn put_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        // The answer comes when what was appended before has been taken: it is stored before the checkpoint is.
        self.log()?;
        let _putting = self.pages.putting();
        let (connection, handle) = self.for_pages()?;
        let id = connection.id();
        connection.expect(id)?;
        let op = Op::Put { handle, sii: new.sii, parent: new.parent, gone: new.gone.to_vec() };
        connection.send(&Request { id, op }, new.manifest)?;
        let sent = Self::send_pages(&connection, id, new);
        connection.send(&Request { id, op: Op::PutEnd { whole: sent.is_ok() } }, &[])?;
        let reply = connection.reply(id);
        sent?;
        match reply? {
            (Answer::Done, _) => Ok(()),
            _ => Err(connection.odd()),
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
        let (connection, handle) = self.for_pages()?;
        loop {
            let op = Op::Pages { handle, sii, range: range.clone() };
            let (Answer::Pages { pages, next }, bytes) = connection.call(op, &[])? else {
                return Err(connection.odd());
            };
            let mut contents = bytes.as_chunks::<PAGE_BYTES>().0.iter();
            for (address, stored) in pages {
                let page: Option<&Page> =
                    if stored { Some(contents.next().ok_or_else(|| connection.odd())?) } else { None };
                each(address, page)?;
            }
            match next {
                None => return Ok(()),
                Some(next) if next > range.start => range.start = next,
                // It would never end.
                Some(_) => return Err(connection.odd()),
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
