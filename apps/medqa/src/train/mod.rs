//! Fine-tuning: from a recipe to a run folder.

mod freeze;
mod record;
mod run;

pub use run::train;
