//! Fine-tuning: from a recipe to a run directory.

mod burn_metrics;
mod command;
mod consolidate;
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

pub use command::{TrainOptions, run};
pub use consolidate::{ConsolidateArgs, consolidate};
pub use memory::{RunSizes, rss_anon_bytes, vm_hwm_bytes};
pub use record::{Summary, peak_rss_bytes};
pub use setup::{apply_method, engine_config};
pub use world::{World, launched_by_mpirun, world_size_and_rank};
