//! Loss scaling for f16: the loss is multiplied by a scale before the backward pass and the gradients are divided by it
//! afterwards.

use crate::{ConfigError, NumericError};

/// The settings of dynamic loss scaling: DeepSpeed's `fp16` block, with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DynamicScale {
    /// The initial scale is 2 to this power.
    pub initial_scale_power: u32,
    /// The number of steps without overflow after which the scale doubles.
    pub loss_scale_window: u64,
    /// The number of overflows before the scale is halved; 1 halves at once.
    pub hysteresis: u64,
    /// True if every step without overflow refills the hysteresis, instead of only a doubling.
    pub consecutive_hysteresis: bool,
    /// The lower bound of the scale.
    pub min_loss_scale: f64,
    /// True if an overflow at the smallest scale is an error (DeepSpeed's ZeRO optimizers), false if the step is
    /// skipped like any other (its `FP16_Optimizer`).
    pub stop_at_minimum: bool,
}

impl Default for DynamicScale {
    fn default() -> Self {
        Self {
            initial_scale_power: 16,
            loss_scale_window: 1000,
            hysteresis: 2,
            consecutive_hysteresis: false,
            min_loss_scale: 1.0,
            stop_at_minimum: true,
        }
    }
}

impl DynamicScale {
    fn checked(self) -> Result<Self, ConfigError> {
        let wrong = |key: &str, expected: &str, found| Err(ConfigError::invalid_value(key, expected, found));
        if self.initial_scale_power > 127 {
            return wrong("fp16.initial_scale_power", "at most 127", self.initial_scale_power.to_string());
        }
        if self.loss_scale_window == 0 {
            return wrong("fp16.loss_scale_window", "at least 1", "0".to_owned());
        }
        if self.hysteresis == 0 {
            return wrong("fp16.hysteresis", "at least 1", "0".to_owned());
        }
        if !(self.min_loss_scale.is_finite() && self.min_loss_scale > 0.0) {
            return wrong("fp16.min_loss_scale", "a finite number above 0", self.min_loss_scale.to_string());
        }
        Ok(self)
    }
}

/// A loss scale and its state: DeepSpeed's `DynamicLossScaler`, or a static scale as the same type.
///
/// All ranks must call [`update`](Self::update) with the same value, so the overflow flag must be reduced over the
/// ranks first. The state is part of a checkpoint: serialize the whole value.
///
/// ```
/// use burn_zero::precision::{DynamicScale, LossScaler};
///
/// let mut scaler = LossScaler::dynamic(DynamicScale { hysteresis: 1, ..Default::default() })?;
/// assert_eq!(scaler.scale(), 65536.0);
/// assert!(!scaler.update(true)?, "the step is skipped");
/// assert_eq!(scaler.scale(), 32768.0);
/// # Ok::<(), burn_zero::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LossScaler {
    scale: f64,
    /// The settings of dynamic scaling; `None` keeps the scale constant.
    dynamic: Option<DynamicScale>,
    /// The number of steps so far, skipped ones included.
    steps: u64,
    /// The number of steps up to and including the last overflow, 0 if there was none.
    overflowed: u64,
    /// The number of overflows left before the scale is halved.
    hysteresis: u64,
}

impl LossScaler {
    /// Creates a constant scale: 1 for f32 and bf16, `fp16.loss_scale` if that is not 0.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] if the scale is not a finite number above 0.
    pub fn fixed(scale: f64) -> Result<Self, ConfigError> {
        if !(scale.is_finite() && scale > 0.0) {
            let expected = "a finite number above 0 (0 in a ds_config asks for the dynamic scale)";
            return Err(ConfigError::invalid_value("fp16.loss_scale", expected, scale.to_string()));
        }
        Ok(Self { scale, dynamic: None, steps: 0, overflowed: 0, hysteresis: 1 })
    }

    /// Creates a scale that is halved when gradients overflow and doubled after a window without overflow.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] for a window or hysteresis of 0, a minimum that is not a finite number
    /// above 0, or an initial scale that f32 cannot represent.
    pub fn dynamic(settings: DynamicScale) -> Result<Self, ConfigError> {
        let settings = settings.checked()?;
        let scale = f64::from(settings.initial_scale_power).exp2();
        Ok(Self { scale, dynamic: Some(settings), steps: 0, overflowed: 0, hysteresis: settings.hysteresis })
    }

    /// Returns the factor by which the loss is multiplied and the gradients are divided.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the number of steps so far, skipped ones included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates the scale after a backward pass and returns whether the optimizer may step. `overflow` says whether the
    /// gradients of any rank contain an infinity or NaN. Scale and hysteresis are then those of the next step.
    ///
    /// # Errors
    /// Returns [`NumericError::LossScale`] on an overflow at the smallest scale, if `stop_at_minimum`.
    pub fn update(&mut self, overflow: bool) -> Result<bool, NumericError> {
        if let Some(settings) = self.dynamic {
            if overflow {
                self.lower(settings)?;
            } else {
                self.raise(settings);
            }
        }
        self.steps += 1;
        if overflow {
            self.overflowed = self.steps;
        }
        Ok(!overflow)
    }

    fn lower(&mut self, settings: DynamicScale) -> Result<(), NumericError> {
        if self.hysteresis > 1 {
            self.hysteresis -= 1;
        } else if self.scale == settings.min_loss_scale && settings.stop_at_minimum {
            return Err(NumericError::LossScale { step: self.steps, scale: self.scale });
        } else {
            self.scale = (self.scale / 2.0).max(settings.min_loss_scale);
        }
        Ok(())
    }

    fn raise(&mut self, settings: DynamicScale) {
        if settings.consecutive_hysteresis {
            self.hysteresis = settings.hysteresis;
        }
        // The steps without overflow before this one: the scale doubles in the step after a full window, as in
        // DeepSpeed.
        let clean = self.steps - self.overflowed;
        if clean > 0 && clean.is_multiple_of(settings.loss_scale_window) {
            self.hysteresis = settings.hysteresis;
            self.scale *= 2.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: bool = false;
    const OVERFLOW: bool = true;

    fn scaler(power: u32) -> LossScaler {
        let settings = DynamicScale {
            initial_scale_power: power,
            loss_scale_window: 2,
            hysteresis: 1,
            stop_at_minimum: false,
            ..Default::default()
        };
        LossScaler::dynamic(settings).unwrap()
    }

    fn trace(scaler: &mut LossScaler, outcomes: &[bool]) -> Vec<f64> {
        let step = |overflow: &bool| {
            assert_eq!(scaler.update(*overflow).unwrap(), !overflow);
            scaler.scale()
        };
        outcomes.iter().map(step).collect()
    }

    /// The three traces of DeepSpeed's `test_dynamic_loss_scale.py`.
    #[test]
    fn the_traces_of_deepspeed_hold() {
        let mut clean = scaler(8);
        let expected = [256.0, 256.0, 512.0, 512.0, 1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0];
        assert_eq!(trace(&mut clean, &[CLEAN; 10]), expected);
        assert_eq!(clean.steps(), 10);

        let mut overflowing = scaler(4);
        assert_eq!(trace(&mut overflowing, &[OVERFLOW; 8]), [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(overflowing.steps(), 8);

        let mut mixed = scaler(8);
        assert_eq!(trace(&mut mixed, &[OVERFLOW, OVERFLOW]), [128.0, 64.0]);
        assert_eq!(trace(&mut mixed, &[CLEAN, CLEAN, CLEAN]), [64.0, 64.0, 128.0]);
        assert_eq!(trace(&mut mixed, &[OVERFLOW]), [64.0]);
        assert_eq!(mixed.steps(), 6);
    }

    #[test]
    fn the_unfused_minimum_is_below_one() {
        let settings = DynamicScale { min_loss_scale: 0.25, ..scaler(4).dynamic.unwrap() };
        let mut scaler = LossScaler::dynamic(settings).unwrap();
        assert_eq!(trace(&mut scaler, &[OVERFLOW; 8]), [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.25, 0.25]);
    }

    #[test]
    fn hysteresis_swallows_overflows_until_it_is_refilled() {
        let steps = [OVERFLOW, CLEAN, OVERFLOW, CLEAN, OVERFLOW, CLEAN, CLEAN, CLEAN, OVERFLOW, OVERFLOW];
        // (every clean step refills, expected scales)
        let table = [
            (false, [256.0, 256.0, 128.0, 128.0, 64.0, 64.0, 64.0, 128.0, 128.0, 64.0]),
            (true, [256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 512.0, 512.0, 256.0]),
        ];
        for (consecutive_hysteresis, expected) in table {
            let settings = DynamicScale {
                initial_scale_power: 8,
                loss_scale_window: 2,
                consecutive_hysteresis,
                ..Default::default()
            };
            let mut scaler = LossScaler::dynamic(settings).unwrap();
            assert_eq!(trace(&mut scaler, &steps), expected, "consecutive {consecutive_hysteresis}");
        }
    }

    #[test]
    fn an_overflow_at_the_minimum_stops_where_asked() {
        let settings = DynamicScale { initial_scale_power: 1, hysteresis: 1, ..Default::default() };
        let mut scaler = LossScaler::dynamic(settings).unwrap();
        assert_eq!(trace(&mut scaler, &[OVERFLOW]), [1.0]);
        let message = scaler.update(OVERFLOW).unwrap_err().to_string();
        let deepspeed = "Current loss scale already at minimum - cannot decrease scale anymore.";
        assert!(message.starts_with(deepspeed), "{message}");
        assert!(message.contains("Step 1 overflowed at a scale of 1"), "{message}");
    }

    #[test]
    fn a_fixed_scale_stays_and_still_skips() {
        let mut scaler = LossScaler::fixed(128.0).unwrap();
        assert_eq!(trace(&mut scaler, &[CLEAN, OVERFLOW, CLEAN, OVERFLOW]), [128.0; 4]);
        assert_eq!(scaler.steps(), 4);
    }

    #[test]
    fn a_saved_scaler_goes_on_where_it_stopped() {
        let settings = DynamicScale { loss_scale_window: 3, ..Default::default() };
        let outcomes: Vec<_> = (0..40_u32).map(|step| step.is_multiple_of(7) || step.is_multiple_of(11)).collect();
        let mut unbroken = LossScaler::dynamic(settings).unwrap();
        let expected = trace(&mut unbroken, &outcomes);
        for stop in 0..outcomes.len() {
            let mut first = LossScaler::dynamic(settings).unwrap();
            let mut found = trace(&mut first, &outcomes[..stop]);
            let saved = serde_json::to_string(&first).unwrap();
            let mut second: LossScaler = serde_json::from_str(&saved).unwrap();
            found.extend(trace(&mut second, &outcomes[stop..]));
            assert_eq!(found, expected, "stopped after {stop}");
            assert_eq!(second, unbroken, "stopped after {stop}");
        }
    }

    #[test]
    fn settings_without_sense_are_refused() {
        let good = DynamicScale::default();
        let table = [
            (DynamicScale { loss_scale_window: 0, ..good }, "loss_scale_window"),
            (DynamicScale { hysteresis: 0, ..good }, "hysteresis"),
            (DynamicScale { min_loss_scale: 0.0, ..good }, "min_loss_scale"),
            (DynamicScale { min_loss_scale: f64::NAN, ..good }, "min_loss_scale"),
            (DynamicScale { initial_scale_power: 128, ..good }, "initial_scale_power"),
        ];
        for (settings, field) in table {
            let message = LossScaler::dynamic(settings).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
        for scale in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            assert!(LossScaler::fixed(scale).unwrap_err().to_string().contains("fp16.loss_scale"), "{scale}");
        }
    }
}
