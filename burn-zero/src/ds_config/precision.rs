//! The `fp16` and `bf16` blocks: the precision of the forward and the backward pass.

use crate::{
    ConfigError,
    precision::{DynamicScale, LossScaler},
};
use serde_json::{Map, Value, json};

/// The precision of the forward and the backward pass; the optimizer computes in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// f16, with loss scaling.
    F16 {
        /// A static loss scale, or 0 for dynamic loss scaling.
        loss_scale: f64,
        /// The settings of dynamic loss scaling.
        dynamic: DynamicScale,
    },
}

impl Precision {
    /// Returns the loss scaler; its scale is 1 unless the precision is f16.
    ///
    /// # Errors
    /// [`ConfigError::InvalidValue`] for an invalid loss scale.
    pub fn loss_scaler(&self) -> Result<LossScaler, ConfigError> {
        match *self {
            Self::F32 | Self::Bf16 => LossScaler::fixed(1.0),
            Self::F16 { loss_scale: 0.0, dynamic } => LossScaler::dynamic(dynamic),
            Self::F16 { loss_scale, .. } => LossScaler::fixed(loss_scale),
        }
    }

    pub(super) fn to_blocks(self) -> Map<String, Value> {
        let (name, block) = match self {
            Self::F32 => return Map::new(),
            Self::Bf16 => ("bf16", json!({"enabled": true})),
            Self::F16 { loss_scale, dynamic } => (
                "fp16",
                json!({
                    "enabled": true,
                    "loss_scale": loss_scale,
                    "initial_scale_power": dynamic.initial_scale_power,
                    "loss_scale_window": dynamic.loss_scale_window,
                    "hysteresis": dynamic.hysteresis,
                    "consecutive_hysteresis": dynamic.consecutive_hysteresis,
                    "min_loss_scale": dynamic.min_loss_scale,
                }),
            ),
        };
        Map::from_iter([(name.to_owned(), block)])
    }
}

/// The `fp16` block.
#[derive(serde::Deserialize)]
#[serde(default)]
pub(super) struct Fp16Config {
    enabled: bool,
    loss_scale: f64,
    initial_scale_power: u32,
    loss_scale_window: u64,
    hysteresis: u64,
    consecutive_hysteresis: bool,
    min_loss_scale: f64,
}

impl Default for Fp16Config {
    fn default() -> Self {
        let dynamic = DynamicScale::default();
        Self {
            enabled: false,
            loss_scale: 0.0,
            initial_scale_power: dynamic.initial_scale_power,
            loss_scale_window: dynamic.loss_scale_window,
            hysteresis: dynamic.hysteresis,
            consecutive_hysteresis: dynamic.consecutive_hysteresis,
            min_loss_scale: dynamic.min_loss_scale,
        }
    }
}

/// The `bf16` block.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
pub(super) struct Bf16Config {
    enabled: bool,
}

/// Returns the precision that the two blocks select.
///
/// # Errors
/// [`ConfigError::InvalidValue`] if both blocks are enabled, or for an invalid loss scale.
pub(super) fn resolve_precision(fp16: Fp16Config, bf16: &Bf16Config) -> Result<Precision, ConfigError> {
    let precision = match (fp16.enabled, bf16.enabled) {
        (true, true) => {
            let expected = "false, because fp16.enabled is true and they cannot be simultaneously enabled";
            return Err(ConfigError::invalid_value("bf16.enabled", expected, "true"));
        }
        (false, false) => Precision::F32,
        (false, true) => Precision::Bf16,
        (true, false) => Precision::F16 {
            loss_scale: fp16.loss_scale,
            dynamic: DynamicScale {
                initial_scale_power: fp16.initial_scale_power,
                loss_scale_window: fp16.loss_scale_window,
                hysteresis: fp16.hysteresis,
                consecutive_hysteresis: fp16.consecutive_hysteresis,
                min_loss_scale: fp16.min_loss_scale,
                ..DynamicScale::default()
            },
        },
    };
    precision.loss_scaler()?;
    Ok(precision)
}
