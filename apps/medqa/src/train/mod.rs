//! Fine-tuning: from a recipe to a run folder.

mod consolidate;
mod dashboards;
mod elsewhere;
mod figures;
mod freeze;
mod interrupt;
mod journal;
mod launch;
mod learner;
mod memory;
mod plot;
mod quiet;
mod record;
mod run;
mod scalars;
mod setup;
mod state;
mod tensorboard;
mod wandb;
mod wire;
mod world;

pub use consolidate::consolidate;
pub use launch::{Options, run, train};
pub use memory::{Load, held, most_held};
pub use record::{Summary, peak_rss_bytes};
pub use setup::{adapt, engine};
pub use world::World;
