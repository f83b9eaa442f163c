//! A world of one rank.

use super::{CommVolume, Communicator, Exchange, Message, Operation, Traffic};
use crate::{CommError, Error};

/// The communicator of a world of one rank: every collective is the identity and nothing is sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn start(&mut self, operation: Operation, outgoing: Vec<Message>, incoming: &[usize]) -> Result<Exchange, Error> {
        let peer = outgoing.first().map(|message| message.to).or(incoming.first().copied());
        match peer {
            Some(rank) => Err(CommError::UnknownRank { operation: operation.name(), rank, world: 1 }.into()),
            None => Ok(Exchange::complete(operation, Vec::new())),
        }
    }

    fn split(&mut self, _: usize, _: usize) -> Result<Box<dyn Communicator>, Error> {
        Ok(Box::new(Solo))
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn record_sent(&mut self, _: Operation, _: CommVolume) {}
}
