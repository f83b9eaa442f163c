//! A world of one.

use super::{Communicator, Traffic};
use crate::Error;

/// The only rank of its world: every collective is the identity and nothing is sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

fn same_length(operation: &'static str, expected: usize, found: usize) -> Result<(), Error> {
    if expected == found { Ok(()) } else { Err(Error::Length { operation, expected, found }) }
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn reduce_scatter(&mut self, buffer: &[f32], shard: &mut [f32]) -> Result<(), Error> {
        same_length("reduce_scatter", buffer.len(), shard.len())?;
        shard.copy_from_slice(buffer);
        Ok(())
    }

    fn all_gather(&mut self, shard: &[f32], buffer: &mut [f32]) -> Result<(), Error> {
        same_length("all_gather", shard.len(), buffer.len())?;
        buffer.copy_from_slice(shard);
        Ok(())
    }

    fn broadcast(&mut self, _: &mut [f32], root: usize) -> Result<(), Error> {
        if root == 0 { Ok(()) } else { Err(Error::Rank { operation: "broadcast", rank: root, world: 1 }) }
    }

    fn send(&mut self, _: &[f32], to: usize) -> Result<(), Error> {
        Err(Error::Rank { operation: "send", rank: to, world: 1 })
    }

    fn recv(&mut self, _: &mut [f32], from: usize) -> Result<(), Error> {
        Err(Error::Rank { operation: "recv", rank: from, world: 1 })
    }

    fn barrier(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn split(&self, _: usize, _: usize) -> Result<Box<dyn Communicator>, Error> {
        Ok(Box::new(Solo))
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_collective_of_one_rank_is_the_identity() {
        let (mut solo, values) = (Solo, [1.0, 2.0, 3.0]);
        let (mut sum, mut shard, mut all) = (values, [0.0; 3], [0.0; 3]);
        solo.all_reduce(&mut sum).unwrap();
        solo.reduce_scatter(&values, &mut shard).unwrap();
        solo.all_gather(&values, &mut all).unwrap();
        assert_eq!((sum, shard, all), (values, values, values));
        assert!(solo.all_gather(&values, &mut [0.0]).is_err());
        assert!(solo.send(&values, 0).is_err() && solo.broadcast(&mut sum, 1).is_err());
        assert_eq!(solo.traffic(), Traffic::default());
    }
}
