//! What a writer knows of its appends while they are under way to a store elsewhere.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
#[cfg(feature = "nats")]
use std::time::{Duration, Instant};

use crate::{Batch, Error, UnitName};

/// Records that may be under way, bytes.
const UNDER_WAY_MAX: u64 = 16 << 20;

type Call = Arc<dyn Fn() + Send + Sync>;

/// Tells the caller of an append that failed; see [`Watch::failure`].
pub(crate) type Tell<'a> = &'a dyn Fn() -> Result<(), Error>;

/// The acknowledgements of one writer, for those who wait for them.
pub(crate) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// SII of the next append.
    next: u64,
    acknowledged: u64,
    /// SII behind a batch that is under way, and its bytes.
    under_way: VecDeque<(u64, u64)>,
    bytes: u64,
    /// An append was refused, or (for good) nothing will be taken any more.
    failed: Option<(Error, bool)>,
    /// Nothing will be acknowledged for now.
    stuck: Option<Error>,
    notify: Option<Call>,
}

/// What is known of a record.
#[derive(Debug)]
pub(crate) enum Look {
    Acknowledged,
    /// An append was refused.
    Failed,
    /// It will not be acknowledged for now.
    Stuck(Error),
    Waiting,
}

impl State {
    /// Whether so many bytes more may be under way, or there is something else to say.
    fn has_room(&self, bytes: u64) -> bool {
        self.bytes == 0 || self.bytes + bytes <= UNDER_WAY_MAX || self.failed.is_some() || self.stuck.is_some()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        write!(f, "Watch({} of {} acknowledged)", state.acknowledged, state.next)
    }
}

impl Watch {
    pub(crate) fn new(next: u64, acknowledged: u64) -> Self {
        let under_way = VecDeque::new();
        let state = State { next, acknowledged, under_way, bytes: 0, failed: None, stuck: None, notify: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let call = state.notify.clone();
        drop(state);
        self.changed.notify_all();
        if let Some(call) = call {
            call();
        }
    }

    pub(crate) fn acknowledge(&self, sii: u64) {
        self.change(|state| {
            state.acknowledged = state.acknowledged.max(sii);
            state.stuck = None;
            while let Some((_, bytes)) = state.under_way.pop_front_if(|(next, _)| *next <= sii) {
                state.bytes -= bytes;
            }
        });
    }

    pub(crate) fn fail(&self, error: &Error, for_good: bool) {
        self.change(|state| {
            if !state.failed.as_ref().is_some_and(|(_, good)| *good) {
                state.failed = Some((error.clone(), for_good));
            }
        });
    }

    pub(crate) fn stuck(&self, error: &Error) {
        self.change(|state| state.stuck = Some(error.clone()));
    }

    pub(crate) fn notify(&self, call: Box<dyn Fn() + Send + Sync>) {
        self.lock().notify = Some(Arc::from(call));
    }

    /// Why an append was refused, and whether that is for good.
    pub(crate) fn failure(&self) -> Option<(Error, bool)> {
        self.lock().failed.clone()
    }

    /// Appending goes on at `end`, where what is stored ends, after a refusal.
    pub(crate) fn resume(&self, end: u64) {
        let mut state = self.lock();
        state.next = end;
        while let Some((_, bytes)) = state.under_way.pop_back_if(|(next, _)| *next > end) {
            state.bytes -= bytes;
        }
        state.failed = None;
    }

    /// The log ends at `end`, everything in it is acknowledged, and nothing is under way. That may be known before the last
    /// acknowledgement has come.
    pub(crate) fn settled(&self, end: u64) {
        let mut state = self.lock();
        (state.next, state.acknowledged, state.bytes) = (end, end, 0);
        state.under_way.clear();
    }

    /// The log begins at `sii` or later.
    pub(crate) fn skip_to(&self, sii: u64) {
        let mut state = self.lock();
        if sii > state.next {
            (state.next, state.acknowledged) = (sii, sii);
        }
    }

    /// SII of the next append.
    #[cfg(feature = "nats")]
    pub(crate) fn next(&self) -> u64 {
        self.lock().next
    }

    /// Whether [`Watch::admit`] would not wait for room.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.lock().has_room(bytes as u64)
    }

    /// Batches under way.
    pub(crate) fn batches(&self) -> usize {
        self.lock().under_way.len()
    }

    /// What there is to say of the record of `sii`.
    pub(crate) fn look(&self, sii: u64) -> Look {
        let state = self.lock();
        match (&state.failed, &state.stuck) {
            _ if state.acknowledged > sii => Look::Acknowledged,
            (Some(_), _) => Look::Failed,
            (None, Some(e)) => Look::Stuck(e.clone()),
            (None, None) => Look::Waiting,
        }
    }

    /// Waits for room and takes note of a batch that is about to be on its way; `log` tells what is stored. One caller at
    /// a time.
    pub(crate) fn admit(
        &self,
        unit: &UnitName,
        batch: &Batch,
        log: &dyn Fn() -> Result<Range<u64>, Error>,
    ) -> Result<(), Error> {
        let bytes = batch.body().len() as u64;
        let mut state = self.lock();
        if batch.first() != state.next {
            let expected = state.next;
            drop(state);
            // An empty log may skip.
            let log = log()?;
            if !log.is_empty() || batch.first() < log.end {
                return Err(Error::OutOfOrder { unit: unit.to_string(), expected, got: batch.first() });
            }
            state = self.lock();
        }
        while !state.has_room(bytes) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let (Some(e), true) = (&state.stuck, state.bytes > 0 && state.bytes + bytes > UNDER_WAY_MAX) {
            return Err(e.clone());
        }
        state.next = batch.next();
        state.bytes += bytes;
        state.under_way.push_back((batch.next(), bytes));
        Ok(())
    }

    pub(crate) fn acknowledged(&self, tell: Tell<'_>) -> Result<u64, Error> {
        let (acknowledged, next, stuck) = {
            let state = self.lock();
            (state.acknowledged, state.next, state.stuck.clone())
        };
        if acknowledged < next {
            tell()?;
            if let Some(e) = stuck {
                return Err(e);
            }
        }
        Ok(acknowledged)
    }

    #[cfg(feature = "nats")]
    pub(crate) fn wait(&self, unit: &UnitName, sii: u64, timeout: Duration, tell: Tell<'_>) -> Result<(), Error> {
        let end = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        while state.acknowledged <= sii {
            if state.failed.is_some() {
                drop(state);
                tell()?;
                state = self.lock();
                continue;
            }
            if let Some(e) = &state.stuck {
                return Err(e.clone());
            }
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Error::Timeout { unit: unit.to_string(), sii });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}
