//! Fine-tuning: from a recipe to a run folder.

mod record;
mod run;

pub use record::Summary;
pub use run::{run, train};
