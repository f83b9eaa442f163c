//! Fine-tuning: from a recipe to a run folder.

mod figures;
mod interrupt;
mod learner;
mod quiet;
mod record;
mod run;
mod state;

pub use record::Summary;
pub use run::{Options, run, train};
