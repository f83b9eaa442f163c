//! The thread that updates weights on the host, in parallel with computation and communication.

use super::OffloadedStates;
use crate::{
    Error,
    comm::{AsyncCommunicator, Lane, Pending},
    host_or_device::HostOrDevice,
    optimizer::Hyperparameters,
    sharding::ParamShard,
    worker::Worker,
};
use burn::{module::ParamId, tensor::backend::Backend};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The host optimizer: a rank's optimizer states and the thread that updates them.
pub(crate) struct HostOptimizer {
    states: Arc<Mutex<OffloadedStates>>,
    worker: Worker<Arc<Mutex<OffloadedStates>>>,
}

/// The update of one parameter shard.
pub(crate) struct ShardUpdate<B: Backend> {
    pub piece: ParamShard,
    /// The parameter's id and its number of values in full.
    pub parameter: (ParamId, usize),
    pub rates: Hyperparameters,
    pub value: HostOrDevice<B>,
    /// The gradient; without one the weights stay as they are.
    pub gradient: Option<HostOrDevice<B>>,
}

fn lock(offload: &Mutex<OffloadedStates>) -> MutexGuard<'_, OffloadedStates> {
    offload.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostOptimizer {
    /// Starts the thread; its work is recorded in the communicator's trace.
    pub fn new(offload: OffloadedStates, communicator: &AsyncCommunicator) -> Self {
        let offload = Arc::new(Mutex::new(offload));
        let name = format!("optimizer of rank {}", communicator.rank());
        let (compute_lock, trace) = (communicator.compute_lock().clone(), communicator.trace().clone());
        let worker = Worker::new(name, offload.clone(), compute_lock, trace);
        Self { states: offload, worker }
    }

    /// Locks and returns the states; waits for an update that is running.
    pub fn lock_states(&self) -> MutexGuard<'_, OffloadedStates> {
        lock(&self.states)
    }

    /// Queues the updates of a bucket and returns its pending result.
    pub fn submit<B: Backend>(&self, tasks: Vec<ShardUpdate<B>>) -> Pending<Vec<(ParamShard, HostOrDevice<B>)>> {
        self.worker.submit("update", Lane::Optimizer, move |offload| {
            let mut offload = lock(offload);
            let mut run = |task: ShardUpdate<B>| -> Result<_, Error> {
                let Some(gradient) = task.gradient else { return Ok((task.piece, task.value)) };
                let mut values = task.value.into_host();
                offload.update(task.parameter, task.rates, (&mut values, &gradient.into_host()))?;
                Ok((task.piece, HostOrDevice::Host(values)))
            };
            tasks.into_iter().map(&mut run).collect()
        })
    }
}
