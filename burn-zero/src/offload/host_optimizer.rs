//! The thread that updates weights on the host, in parallel with computation and communication.

use super::{OffloadedStates, ParamRef};
use crate::{
    Error,
    comm::{AsyncCommunicator, Lane, Pending},
    host_or_device::HostOrDevice,
    optimizer::Hyperparameters,
    sharding::ParamShard,
    worker::Worker,
};
use burn::tensor::backend::Backend;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The host optimizer: a rank's optimizer states and the thread that updates them.
pub(crate) struct HostOptimizer {
    states: Arc<Mutex<OffloadedStates>>,
    worker: Worker<Arc<Mutex<OffloadedStates>>>,
}

/// The update of one parameter shard.
pub(crate) struct ShardUpdate<B: Backend> {
    pub shard: ParamShard,
    pub parameter: ParamRef,
    pub hyperparameters: Hyperparameters,
    pub value: HostOrDevice<B>,
    /// The gradient; without one the weights stay as they are.
    pub gradient: Option<HostOrDevice<B>>,
}

fn lock(states: &Mutex<OffloadedStates>) -> MutexGuard<'_, OffloadedStates> {
    states.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostOptimizer {
    /// Starts the thread; its work is recorded in the communicator's trace.
    pub(crate) fn new(states: OffloadedStates, communicator: &AsyncCommunicator) -> Self {
        let states = Arc::new(Mutex::new(states));
        let name = format!("optimizer of rank {}", communicator.rank());
        let worker =
            Worker::new(name, states.clone(), communicator.compute_lock().clone(), communicator.trace().clone());
        Self { states, worker }
    }

    /// Locks and returns the states; waits for an update that is running.
    pub(crate) fn lock_states(&self) -> MutexGuard<'_, OffloadedStates> {
        lock(&self.states)
    }

    /// Queues the updates of a bucket and returns its pending result.
    pub(crate) fn submit<B: Backend>(
        &self,
        updates: Vec<ShardUpdate<B>>,
    ) -> Pending<Vec<(ParamShard, HostOrDevice<B>)>> {
        self.worker.submit("update", Lane::Optimizer, move |states| {
            let mut states = lock(states);
            let mut run = |update: ShardUpdate<B>| -> Result<_, Error> {
                let ShardUpdate { shard, parameter, hyperparameters, value, gradient } = update;
                let Some(gradient) = gradient else { return Ok((shard, value)) };
                let mut values = value.into_host();
                states.update(parameter, hyperparameters, &mut values, &gradient.into_host())?;
                Ok((shard, HostOrDevice::Host(values)))
            };
            updates.into_iter().map(&mut run).collect()
        })
    }
}
