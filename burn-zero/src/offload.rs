//! Optimizer states off the device: they are kept in host memory or in a file, and the optimizer runs on the host.
//!
//! ```text
//!  gradient shard ─► host ─┐
//!  weight shard   ─► host ─┴► Adam over slices ─► weight shard ─► device
//!                                ▲   │
//!             host or file: exp_avg, exp_avg_sq      a file is read ahead and written behind through a few buffers
//!
//!  communication   ─ gradients of bucket 3 ─ … of 0 │           │ weights of 0 │ weights of 1 │
//!  compute         ─ backward 3 ─ 2 ─ 1 ─ 0 ────────┤ norm      │              │ to device 0  │ …
//!  optimizer                                        │ update 0  │ update 1     │ update 2     │
//! ```
//!
//! Gradients are copied to the host during the backward pass. Clipping by the global norm needs all gradients before
//! the first update, and so does the guarantee that a step with non-finite gradients changes nothing: the updates then
//! begin after the backward pass. Without either
//! ([`Engine::train_step`](crate::Engine::train_step)) an update begins as soon as its gradients arrive:
//!
//! ```text
//!  communication   ─ gradients of bucket 3 ─ … of 2 ──── … of 1 ──── … of 0 │
//!  compute         ─ backward 3 ─ 2 ────────── 1 ─────────── 0 ─────────────┤ norm
//!  optimizer                         │ update 3  │ update 2    │ update 1   │ update 0
//! ```

use crate::{
    ConfigError, Error,
    optimizer::{
        EightBitMoments, Hyperparameters, MIN_8BIT_SIZE, Optimizer,
        cpu_adam::{AdamSlices, AdamUpdate, HalfCopy},
    },
};
use burn::module::ParamId;
use std::{borrow::Cow, cell::RefCell, collections::HashMap, path::PathBuf};

mod device;
mod file;
mod host_optimizer;

pub use device::OffloadDevice;
use file::MomentFile;
pub(crate) use file::OffloadFile;
pub(crate) use host_optimizer::{HostOptimizer, ShardUpdate};

/// The place where optimizer states or weight shards are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum MemoryTier {
    /// On the device that trains.
    #[default]
    Device,
    /// In host memory.
    Host,
    /// In a file in this folder, one per rank (DeepSpeed's `nvme_path`).
    File(PathBuf),
}

/// The optimizer states of all shards of a rank, kept off the device.
pub(crate) struct OffloadedStates {
    optimizer: Optimizer,
    file: Option<MomentFile>,
    states: HashMap<ParamId, OffloadedState>,
    /// The last read error while a checkpoint was written.
    read_error: RefCell<Option<Error>>,
}

/// The optimizer state of a shard.
struct OffloadedState {
    step: usize,
    moments: MomentStorage,
}

enum MomentStorage {
    Memory {
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
    },
    EightBit(EightBitMoments),
    /// In the offload file, from this value on.
    File {
        start: u64,
        length: usize,
    },
}

/// A parameter to which a shard belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ParamRef {
    pub id: ParamId,
    /// The number of values of the full parameter.
    pub elements: usize,
}

/// A saved optimizer state: the number of updates, both moments, and the block scales of 8-bit moments.
pub(crate) struct StateSnapshot {
    pub step: usize,
    pub moments: [Vec<f32>; 2],
    pub scales: Option<[Vec<f32>; 2]>,
}

impl OffloadedStates {
    /// Creates an empty set of states, and the offload file if the tier asks for one.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] for an optimizer that cannot run on the host, [`Error::Io`] if the file
    /// cannot be created.
    pub(crate) fn new(optimizer: Optimizer, tier: &MemoryTier, rank: usize) -> Result<Self, Error> {
        if optimizer.adam_variant().is_none() {
            let (expected, found) = ("Adam or AdamW if optimizer states are offloaded", format!("{optimizer:?}"));
            return Err(ConfigError::invalid_value("optimizer", expected, found).into());
        }
        let file = match tier {
            MemoryTier::File(folder) => Some(MomentFile::create(folder, rank)?),
            _ => None,
        };
        Ok(Self { optimizer, file, states: HashMap::new(), read_error: RefCell::default() })
    }

    /// Returns the initial moments of a shard of `n` values of a parameter.
    fn initial_moments(&mut self, n: usize, parameter: ParamRef) -> Result<MomentStorage, Error> {
        if matches!(self.optimizer, Optimizer::AdamW8bit(_)) && parameter.elements >= MIN_8BIT_SIZE {
            return Ok(MomentStorage::EightBit(EightBitMoments::new(n)));
        }
        match &mut self.file {
            Some(file) => Ok(MomentStorage::File { start: file.allocate(n)?, length: n }),
            None => Ok(MomentStorage::Memory { exp_avg: vec![-0.0; n], exp_avg_sq: vec![0.0; n] }),
        }
    }

    /// Updates a flat f32 shard of a parameter in place.
    pub(crate) fn update(
        &mut self,
        parameter: ParamRef,
        hyperparameters: Hyperparameters,
        values: &mut [f32],
        gradient: &[f32],
    ) -> Result<(), Error> {
        let mut state = match self.states.remove(&parameter.id) {
            Some(state) => state,
            None => OffloadedState { step: 0, moments: self.initial_moments(values.len(), parameter)? },
        };
        state.step += 1;
        let adam = self.optimizer.adam_variant().expect("checked by the constructor");
        let update = AdamUpdate::new(adam, hyperparameters, state.step);
        match &mut state.moments {
            MomentStorage::Memory { exp_avg, exp_avg_sq } => {
                update.apply(AdamSlices { parameter: values, gradient, exp_avg, exp_avg_sq }, HalfCopy::None);
            }
            MomentStorage::EightBit(codes) => codes.apply(&update, values, gradient),
            MomentStorage::File { start, .. } => {
                let file = self.file.as_mut().expect("the state is in the file");
                file.update(*start, &update, values, gradient)?;
            }
        }
        self.states.insert(parameter.id, state);
        Ok(())
    }

    /// Waits until all pending writes to the file are complete; called at the end of a step.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.file.as_mut().map_or(Ok(()), MomentFile::flush)
    }

    /// Returns the number of updates of a shard; none before the first update.
    pub(crate) fn step(&self, id: ParamId) -> Option<usize> {
        self.states.get(&id).map(|state| state.step)
    }

    /// Returns the block scales of an 8-bit moment; none for other moments.
    pub(crate) fn scales(&self, id: ParamId, slot: usize) -> Option<&[f32]> {
        match &self.states.get(&id)?.moments {
            MomentStorage::EightBit(codes) => Some(codes.scales()[slot]),
            _ => None,
        }
    }

    /// Returns a moment of a shard that has been updated. If the file cannot be read, the result is empty and
    /// [`OffloadedStates::check_reads`] returns the error.
    pub(crate) fn moment(&self, id: ParamId, slot: usize) -> Cow<'_, [f32]> {
        match &self.states[&id].moments {
            MomentStorage::Memory { exp_avg, exp_avg_sq } => Cow::Borrowed([exp_avg, exp_avg_sq][slot]),
            MomentStorage::EightBit(codes) => {
                let [first, second] = codes.values();
                Cow::Owned(if slot == 0 { first } else { second })
            }
            MomentStorage::File { start, length } => {
                let file = self.file.as_ref().expect("the state is in the file");
                let values = file.read(*start, *length, slot).map_err(|error| self.read_error.replace(Some(error)));
                Cow::Owned(values.unwrap_or_default())
            }
        }
    }

    /// Reports a failed read of a moment.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a moment could not be read since the last call.
    pub(crate) fn check_reads(&self) -> Result<(), Error> {
        self.read_error.take().map_or(Ok(()), Err)
    }

    /// Loads a saved state.
    pub(crate) fn restore(&mut self, parameter: ParamRef, saved: StateSnapshot) -> Result<(), Error> {
        let StateSnapshot { step, moments: [exp_avg, exp_avg_sq], scales } = saved;
        let moments = match self.initial_moments(exp_avg.len(), parameter)? {
            MomentStorage::Memory { .. } => MomentStorage::Memory { exp_avg, exp_avg_sq },
            MomentStorage::EightBit(_) => {
                let scales = scales.as_ref().map(|[first, second]| [first.as_slice(), second.as_slice()]);
                MomentStorage::EightBit(EightBitMoments::from_values([&exp_avg, &exp_avg_sq], scales))
            }
            MomentStorage::File { start, length } => {
                let file = self.file.as_mut().expect("the file has just allocated the space");
                file.write(start, [&exp_avg, &exp_avg_sq])?;
                MomentStorage::File { start, length }
            }
        };
        self.states.insert(parameter.id, OffloadedState { step, moments });
        Ok(())
    }

    /// Removes all states.
    pub(crate) fn clear(&mut self) {
        self.states.clear();
        if let Some(file) = &mut self.file {
            file.clear();
        }
    }

    /// Returns the bytes of the states in memory.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |state: &OffloadedState| match &state.moments {
            MomentStorage::Memory { exp_avg, exp_avg_sq } => 4 * (exp_avg.len() + exp_avg_sq.len()),
            MomentStorage::EightBit(codes) => codes.bytes(),
            MomentStorage::File { .. } => 0,
        };
        self.states.values().map(bytes).sum()
    }
}

#[cfg(test)]
mod tests;
