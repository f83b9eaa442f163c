//! Optimizer states off the device: in the host's memory or in a file, and the update where they are.
//!
//! ```text
//!  gradient piece ─► host ─┐
//!  weight piece   ─► host ─┴► Adam over slices ─► weight piece ─► device
//!                                ▲   │
//!             host or file: exp_avg, exp_avg_sq      a file passes through a few buffers, read ahead and written behind
//!
//!  communication   ─ gradients of bucket 3 ─ … of 0 │           │ weights of 0 │ weights of 1 │
//!  compute         ─ backward 3 ─ 2 ─ 1 ─ 0 ────────┤ norm      │              │ to device 0  │ …
//!  optimizer                                        │ update 0  │ update 1     │ update 2     │
//! ```
//!
//! Gradients leave while the backward pass goes on. Clipping by the global norm, and the promise that a step whose gradients
//! are not finite changes nothing, need all of them before the first update: there the pass and the updates meet. Without
//! either ([`Engine::accumulate_and_step`](crate::Engine::accumulate_and_step)) an update begins when its gradients arrive:
//!
//! ```text
//!  communication   ─ gradients of bucket 3 ─ … of 2 ──── … of 1 ──── … of 0 │
//!  compute         ─ backward 3 ─ 2 ────────── 1 ─────────── 0 ─────────────┤ norm
//!  optimizer                         │ update 3  │ update 2    │ update 1   │ update 0
//! ```

use crate::{
    Error, ds_config,
    optimizer::{
        EightBit, LEAST_8BIT, Optimizer, Rates,
        cpu_adam::{Copy, Slices, Update},
    },
};
use burn::module::ParamId;
use std::{borrow::Cow, cell::RefCell, collections::HashMap, path::PathBuf};

mod desk;
mod file;

pub(crate) use desk::{Desk, Task};
pub(crate) use file::Shelf;
use file::States;

/// Where optimizer states are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Tier {
    /// On the device that trains.
    #[default]
    Device,
    /// In the host's memory.
    Host,
    /// In a file in this folder, one per rank (DeepSpeed's `nvme_path`).
    File(PathBuf),
}

impl From<&ds_config::Offload> for Tier {
    fn from(offload: &ds_config::Offload) -> Self {
        match (offload.device, &offload.nvme_path) {
            (ds_config::Device::None, _) => Self::Device,
            (ds_config::Device::Nvme, Some(folder)) => Self::File(folder.clone()),
            // A ds_config that has been checked has a folder with its nvme.
            (ds_config::Device::Cpu | ds_config::Device::Nvme, _) => Self::Host,
        }
    }
}

/// States of all pieces of a rank.
pub(crate) struct Offload {
    settings: Optimizer,
    file: Option<States>,
    states: HashMap<ParamId, HostState>,
    /// The last read that failed while a state was saved.
    failed: RefCell<Option<Error>>,
}

/// What is remembered of a piece.
struct HostState {
    step: usize,
    moments: Moments,
}

enum Moments {
    Here {
        exp_avg: Vec<f32>,
        exp_avg_sq: Vec<f32>,
    },
    EightBit(EightBit),
    /// In the file, from this value on.
    File {
        start: u64,
        length: usize,
    },
}

/// A state as it is saved: the number of updates, both moments, and the scales of 8-bit ones.
pub(crate) struct Snapshot {
    pub step: usize,
    pub moments: [Vec<f32>; 2],
    pub scales: Option<[Vec<f32>; 2]>,
}

impl Offload {
    /// # Errors
    /// [`Error::Setting`] for an optimizer that the host cannot compute, [`Error::Path`] if the file cannot be made.
    pub fn new(optimizer: Optimizer, tier: &Tier, rank: usize) -> Result<Self, Error> {
        if optimizer.adam().is_none() {
            let (expected, found) = ("Adam or AdamW where states are offloaded", format!("{optimizer:?}"));
            return Err(Error::Setting { field: "optimizer", expected, found });
        }
        let file = match tier {
            Tier::File(folder) => Some(States::create(folder, rank)?),
            _ => None,
        };
        Ok(Self { settings: optimizer, file, states: HashMap::new(), failed: RefCell::default() })
    }

    /// The moments of a piece of `n` values of a parameter of `whole` before the first update.
    fn fresh(&mut self, n: usize, whole: usize) -> Result<Moments, Error> {
        if matches!(self.settings, Optimizer::AdamW8bit(_)) && whole >= LEAST_8BIT {
            return Ok(Moments::EightBit(EightBit::new(n)));
        }
        match &mut self.file {
            Some(file) => Ok(Moments::File { start: file.allocate(n)?, length: n }),
            None => Ok(Moments::Here { exp_avg: vec![-0.0; n], exp_avg_sq: vec![0.0; n] }),
        }
    }

    /// Updates the flat f32 piece of a parameter, of `whole` values in all.
    pub fn update(
        &mut self,
        (id, whole): (ParamId, usize),
        rates: Rates,
        (parameter, gradient): (&mut [f32], &[f32]),
    ) -> Result<(), Error> {
        let mut state = match self.states.remove(&id) {
            Some(state) => state,
            None => HostState { step: 0, moments: self.fresh(parameter.len(), whole)? },
        };
        state.step += 1;
        let (settings, decoupled) = self.settings.adam().expect("it was checked when this was made");
        let Rates { lr, weight_decay, scale } = rates;
        let update = Update { settings, decoupled, lr, weight_decay, scale, step: state.step };
        match &mut state.moments {
            Moments::Here { exp_avg, exp_avg_sq } => {
                update.apply(Slices { parameter, gradient, exp_avg, exp_avg_sq }, Copy::None);
            }
            Moments::EightBit(codes) => codes.apply(&update, parameter, gradient),
            Moments::File { start, .. } => {
                let file = self.file.as_mut().expect("the state is in it");
                file.update(*start, &update, (parameter, gradient))?;
            }
        }
        self.states.insert(id, state);
        Ok(())
    }

    /// Ends a step: what is on its way to the file arrives.
    pub fn settle(&mut self) -> Result<(), Error> {
        self.file.as_mut().map_or(Ok(()), States::settle)
    }

    /// The number of updates of a piece, if there were any.
    pub fn step(&self, id: ParamId) -> Option<usize> {
        self.states.get(&id).map(|state| state.step)
    }

    /// The scales of a moment in 8 bits.
    pub fn scales(&self, id: ParamId, slot: usize) -> Option<&[f32]> {
        match &self.states.get(&id)?.moments {
            Moments::EightBit(codes) => Some(codes.scales()[slot]),
            _ => None,
        }
    }

    /// A moment of a piece that has been updated. If its file cannot be read it is empty, and [`Offload::check_reads`] says
    /// why.
    pub fn moment(&self, id: ParamId, slot: usize) -> Cow<'_, [f32]> {
        match &self.states[&id].moments {
            Moments::Here { exp_avg, exp_avg_sq } => Cow::Borrowed([exp_avg, exp_avg_sq][slot]),
            Moments::EightBit(codes) => {
                let [first, second] = codes.values();
                Cow::Owned(if slot == 0 { first } else { second })
            }
            Moments::File { start, length } => {
                let file = self.file.as_ref().expect("the state is in it");
                let values = file.read(*start, *length, slot).map_err(|error| self.failed.replace(Some(error)));
                Cow::Owned(values.unwrap_or_default())
            }
        }
    }

    /// # Errors
    /// [`Error::Path`] if a moment could not be read since this was last asked.
    pub fn check_reads(&self) -> Result<(), Error> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Puts a saved state in place.
    pub fn restore(&mut self, (id, whole): (ParamId, usize), saved: Snapshot) -> Result<(), Error> {
        let Snapshot { step, moments: [exp_avg, exp_avg_sq], scales } = saved;
        let moments = match self.fresh(exp_avg.len(), whole)? {
            Moments::Here { .. } => Moments::Here { exp_avg, exp_avg_sq },
            Moments::EightBit(_) => {
                let scales = scales.as_ref().map(|[first, second]| [first.as_slice(), second.as_slice()]);
                Moments::EightBit(EightBit::from_values([&exp_avg, &exp_avg_sq], scales))
            }
            Moments::File { start, length } => {
                let file = self.file.as_mut().expect("it has given the place");
                file.write(start, [&exp_avg, &exp_avg_sq])?;
                Moments::File { start, length }
            }
        };
        self.states.insert(id, HostState { step, moments });
        Ok(())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.states.clear();
        if let Some(file) = &mut self.file {
            file.clear();
        }
    }

    /// Bytes of the states in memory.
    pub fn bytes(&self) -> usize {
        let bytes = |state: &HostState| match &state.moments {
            Moments::Here { exp_avg, exp_avg_sq } => 4 * (exp_avg.len() + exp_avg_sq.len()),
            Moments::EightBit(codes) => codes.bytes(),
            Moments::File { .. } => 0,
        };
        self.states.values().map(bytes).sum()
    }
}

#[cfg(test)]
mod tests;
