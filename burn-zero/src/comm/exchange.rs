//! Exchanges of messages that have been started and may still be running.

use super::{ComputeLock, Operation};
use crate::{CommError, Error, worker::wait_while_helping};
use std::time::Duration;

/// An exchange of messages that [`Communicator::start`](super::Communicator::start) has started. An exchange that is
/// dropped keeps its place in the order: what it would have received is received by nobody.
pub struct Exchange {
    operation: Operation,
    state: ExchangeState,
}

enum ExchangeState {
    Complete(Vec<Vec<u8>>),
    Running { exchange: Box<dyn RunningExchange>, incoming: Vec<usize>, compute_lock: ComputeLock },
}

/// The result of an exchange: the messages in the order of the ranks that they were expected from.
pub(super) type Received = Result<Vec<Vec<u8>>, LostPeer>;

/// An exchange that a transport has started.
pub(super) trait RunningExchange: Send {
    /// Waits for at most `timeout`, or without an end if it is `None`, and returns the result or `None` if the exchange
    /// is still running. The deadline of the receives counts from the first call.
    fn wait_timeout(&mut self, timeout: Option<Duration>) -> Option<Received>;

    /// Returns true if the result is there.
    fn is_done(&self) -> bool;
}

/// A rank that did not answer, and how long the caller has waited for it; `None` if the rank is known to have ended.
#[derive(Debug)]
pub(super) struct LostPeer {
    pub rank: usize,
    pub waited: Option<Duration>,
    /// The rank that it waits for itself, the one that this one waits for, and so on, as far as is known.
    pub waits_for: Vec<usize>,
}

/// Returns the rank that `rank` waits for, the one that this one waits for, and so on, until one waits for nobody or for
/// one that is listed. `awaited` returns the rank that a rank waits for.
pub(super) fn wait_chain(rank: usize, awaited: impl Fn(usize) -> Option<usize>) -> Vec<usize> {
    let mut chain = Vec::new();
    while let Some(next) = awaited(chain.last().copied().unwrap_or(rank)) {
        if next == rank || chain.contains(&next) {
            break;
        }
        chain.push(next);
    }
    chain
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} that {}", self.operation.name(), if self.is_done() { "is done" } else { "is running" })
    }
}

impl Exchange {
    /// Creates an exchange that is complete, with the messages that it has received. Communicators without peers, and
    /// those that wrap another one, need it.
    pub fn complete(operation: Operation, received: Vec<Vec<u8>>) -> Self {
        Self { operation, state: ExchangeState::Complete(received) }
    }

    /// Wraps a running exchange that receives from the ranks `incoming`, by their numbers in the whole world.
    pub(super) fn running(
        operation: Operation,
        exchange: Box<dyn RunningExchange>,
        incoming: Vec<usize>,
        compute_lock: ComputeLock,
    ) -> Self {
        Self { operation, state: ExchangeState::Running { exchange, incoming, compute_lock } }
    }

    /// Returns true if [`Exchange::wait`] would return at once, with the messages or an error.
    pub fn is_done(&self) -> bool {
        match &self.state {
            ExchangeState::Complete(_) => true,
            ExchangeState::Running { exchange, .. } => exchange.is_done(),
        }
    }

    /// Waits until the exchange is complete and returns the messages in the order of the ranks that they come from.
    /// While it waits, other ranks of the process compute.
    ///
    /// # Errors
    /// [`CommError::Lost`] if a rank has ended, has not sent before the deadline, which counts from this call, or has
    /// not received before the deadline, which counts from the start; [`CommError::CollectiveMismatch`] if a rank is in
    /// another collective.
    pub fn wait(self) -> Result<Vec<Vec<u8>>, Error> {
        let (mut exchange, incoming, compute_lock) = match self.state {
            ExchangeState::Complete(received) => return Ok(received),
            ExchangeState::Running { exchange, incoming, compute_lock } => (exchange, incoming, compute_lock),
        };
        let operation = self.operation.name();
        let received = compute_lock.unlocked(|| wait_while_helping(|timeout| exchange.wait_timeout(timeout)));
        let lost = |LostPeer { rank, waited, waits_for }| CommError::Lost { operation, rank, waited, waits_for };
        let mut received = received.map_err(lost)?;
        for (message, &rank) in received.iter_mut().zip(&incoming) {
            if message.pop() != Some(self.operation as u8) {
                return Err(CommError::CollectiveMismatch { operation, rank }.into());
            }
        }
        Ok(received)
    }
}
