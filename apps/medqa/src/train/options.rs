//! The options of a run besides its recipe.

use crate::backend::Device;
use std::path::PathBuf;

/// Options of `train` besides the recipe.
#[derive(Debug, Clone, Default)]
pub(crate) struct TrainOptions {
    /// The run directory.
    pub directory: PathBuf,
    /// True to resume the run that is in it.
    pub resume: bool,
    /// True if a resumed run may go on with other data.
    pub allow_changed_data: bool,
    /// True if burn-train's display uses the terminal.
    pub display: bool,
    /// The training device.
    pub device: Device,
}
