//! The thread that updates weights on the host, beside those that compute and communicate.

use super::Offload;
use crate::{
    Error,
    comm::{Lane, Pending, Queue},
    held::Held,
    optimizer::Rates,
    partition::Piece,
    worker::Worker,
};
use burn::{module::ParamId, tensor::backend::Backend};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A rank's states and the thread that works on them.
pub(crate) struct Desk {
    offload: Arc<Mutex<Offload>>,
    worker: Worker<Arc<Mutex<Offload>>>,
}

/// The update of a piece.
pub(crate) struct Task<B: Backend> {
    pub piece: Piece,
    /// The parameter, and how many values it has in all.
    pub place: (ParamId, usize),
    pub rates: Rates,
    pub value: Held<B>,
    /// None leaves the value as it is.
    pub gradient: Option<Held<B>>,
}

fn lock(offload: &Mutex<Offload>) -> MutexGuard<'_, Offload> {
    offload.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desk {
    /// Starts the thread; it is noted in the queue's trace.
    pub fn new(offload: Offload, queue: &Queue) -> Self {
        let offload = Arc::new(Mutex::new(offload));
        let name = format!("optimizer of rank {}", queue.rank());
        let worker = Worker::new(name, offload.clone(), (queue.turn().clone(), queue.trace().clone()));
        Self { offload, worker }
    }

    /// The states, while no update is under way.
    pub fn states(&self) -> MutexGuard<'_, Offload> {
        lock(&self.offload)
    }

    /// Puts the updates of a bucket behind those that are under way.
    pub fn submit<B: Backend>(&self, tasks: Vec<Task<B>>) -> Pending<Vec<(Piece, Held<B>)>> {
        self.worker.submit(("update", Lane::Optimizer), move |offload| {
            let mut offload = lock(offload);
            let mut run = |task: Task<B>| -> Result<_, Error> {
                let Some(gradient) = task.gradient else { return Ok((task.piece, task.value)) };
                let mut values = task.value.into_host();
                offload.update(task.place, task.rates, (&mut values, &gradient.into_host()))?;
                Ok((task.piece, Held::Host(values)))
            };
            tasks.into_iter().map(&mut run).collect()
        })
    }
}
