//! Fine-tuning: from a recipe to a run folder.

mod dashboards;
mod elsewhere;
mod figures;
mod freeze;
mod interrupt;
mod journal;
mod launch;
mod learner;
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

pub use launch::{Options, run, train};
pub use record::{Summary, peak_rss_bytes};
pub use world::World;
