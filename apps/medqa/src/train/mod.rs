//! Fine-tuning: from a recipe to a run folder.

mod interrupt;
mod record;
mod run;
mod state;

pub use run::train;
