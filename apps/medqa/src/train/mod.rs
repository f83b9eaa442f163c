//! Fine-tuning: from a recipe to a run directory.

mod burn_metrics;
mod command;
mod consolidate;
mod crc;
mod dashboards;
mod eval_device;
mod freeze;
mod interrupt;
mod learner;
mod memory;
mod plot;
mod protobuf;
mod record;
mod run_log;
mod scalars;
mod setup;
mod silent_renderer;
mod state;
mod tensorboard;
mod trainer;
mod wandb;
mod world;

pub use command::{TrainOptions, run, train};
pub use consolidate::consolidate;
pub use memory::{RunFootprint, peak_rss_bytes, rss_anon_bytes};
pub use record::Summary;
pub use setup::{apply_method, engine};
pub use world::World;
