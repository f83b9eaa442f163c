//! Point-to-point messages of tensors between the ranks of a pipeline.

use crate::{
    CommError, Error,
    comm::{AsyncCommunicator, Communicator, Exchange, Lane, Message, Operation, Pending, Trace},
    segment::DynTensor,
};
use burn::tensor::backend::Backend;

mod message;
#[cfg(test)]
mod tests;

/// A value of a message: an output of a segment, or the gradient of an input.
#[derive(Clone, Debug)]
pub(crate) struct P2pValue<B: Backend> {
    /// The tensor, in f32, f16 or bf16; none for the gradient of an input that has no gradient.
    pub tensor: Option<DynTensor<B>>,
    /// True if the sender wants the gradient of this value.
    pub requires_grad: bool,
}

/// Sends and receives messages of tensors over the communicator of the pipeline axis. Sends and receives only start
/// there, so neither holds up what is submitted to the communicator later. Receives from one rank match its messages in
/// the order in which both are started.
///
/// Ranks are numbered along the axis; errors name them by their numbers in the whole world.
#[derive(Debug)]
pub(crate) struct P2p<'a> {
    communicator: &'a AsyncCommunicator,
    /// The sends that nobody has waited for.
    sends: Vec<Pending<Exchange>>,
}

/// A message that is being received.
#[derive(Debug)]
pub(crate) struct P2pReceive {
    exchange: Pending<Exchange>,
    ends: Ends,
    trace: Trace,
}

/// The sender and the receiver of a message, by their numbers in the whole world.
#[derive(Clone, Copy, Debug)]
struct Ends {
    from: usize,
    to: usize,
}

impl Ends {
    fn unexpected(self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let Self { from, to } = self;
        CommError::UnexpectedMessage { from, to, expected: expected.into(), found: found.into() }.into()
    }
}

impl<'a> P2p<'a> {
    /// Creates this rank's end of the messages of one step.
    pub(crate) fn new(communicator: &'a AsyncCommunicator) -> Self {
        Self { communicator, sends: Vec::new() }
    }

    /// Sends values to rank `to`. The tensors move into the communication thread, which copies them to the host; this
    /// thread does not wait for them. The errors of peers surface in [`P2p::finish`].
    ///
    /// # Errors
    /// [`CommError::UnknownRank`] for a rank that does not exist or is this rank, [`CommError::UnexpectedMessage`] for
    /// a tensor of another dtype than f32, f16 and bf16.
    pub(crate) fn send<B: Backend>(&mut self, to: usize, values: Vec<P2pValue<B>>) -> Result<(), Error> {
        let ends = Ends { from: self.communicator.global_rank(self.communicator.rank()), to: self.peer(to)? };
        message::check(&values, ends)?;
        self.sends.push(self.communicator.submit("send", move |group| {
            let message = message::encode(values);
            let volumes = [(Operation::SendObject, message.header), (Operation::Send, message.values)];
            let exchange = group.start(Operation::SendObject, vec![Message { to, bytes: message.bytes }], &[])?;
            volumes.into_iter().for_each(|(operation, volume)| group.record_sent(operation, volume));
            Ok(exchange)
        }));
        Ok(())
    }

    /// Starts to receive the next message of rank `from`. Its deadline counts from [`P2pReceive::wait`], so it can be
    /// started long before.
    ///
    /// # Errors
    /// [`CommError::UnknownRank`] for a rank that does not exist or is this rank.
    pub(crate) fn recv(&self, from: usize) -> Result<P2pReceive, Error> {
        let ends = Ends { from: self.peer(from)?, to: self.communicator.global_rank(self.communicator.rank()) };
        let start = move |group: &mut dyn Communicator| group.start(Operation::SendObject, vec![], &[from]);
        let exchange = self.communicator.submit("recv", start);
        Ok(P2pReceive { exchange, ends, trace: self.communicator.trace().clone() })
    }

    /// Waits until all messages have been sent. Call it at the end of a step.
    ///
    /// # Errors
    /// [`CommError::Lost`] if a rank has not received a message before the deadline, [`CommError::Aborted`] if an
    /// earlier collective of the communicator has failed.
    pub(crate) fn finish(self) -> Result<(), Error> {
        self.sends.into_iter().try_for_each(|send| send.wait()?.wait().map(drop))
    }

    /// Returns the number of a peer in the whole world.
    fn peer(&self, rank: usize) -> Result<usize, Error> {
        let world = self.communicator.world_size();
        if rank < world && rank != self.communicator.rank() {
            return Ok(self.communicator.global_rank(rank));
        }
        Err(CommError::UnknownRank { operation: Operation::SendObject.name(), rank, world }.into())
    }
}

impl P2pReceive {
    /// Waits for the message and creates its tensors on `device`. While it waits, other ranks of the process compute.
    ///
    /// # Errors
    /// [`CommError::Lost`] if the sender has ended or does not send before the deadline,
    /// [`CommError::UnexpectedMessage`] if the message cannot be read, [`CommError::Aborted`] if an earlier collective
    /// of the communicator has failed.
    pub(crate) fn wait<B: Backend>(self, device: &B::Device) -> Result<Vec<P2pValue<B>>, Error> {
        let exchange = self.exchange.wait()?;
        let mut received = self.trace.numbered_span("wait for rank", self.ends.from, Lane::Wait, || exchange.wait())?;
        message::decode(&received.pop().unwrap_or_default(), self.ends, device)
    }
}
