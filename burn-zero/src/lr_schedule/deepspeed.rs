//! DeepSpeed's learning-rate schedules, with its parameters and formulas (`runtime/lr_schedules.py`).

use std::f64::consts::PI;

/// The form of the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarmupType {
    /// Grows with the logarithm of the step.
    Log,
    /// Grows linearly with the step.
    Linear,
}

/// The warm-up of the three warm-up schedules.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    /// The number of steps. Fewer than 2 act as 2, because DeepSpeed divides by the logarithm.
    pub steps: u64,
    /// The form of the warm-up.
    pub warmup_type: WarmupType,
}

impl Warmup {
    fn steps(self) -> u64 {
        self.steps.max(2)
    }

    /// Returns how far the warm-up is at `step`, from 0 to 1; `None` after the warm-up.
    fn progress(self, step: u64) -> Option<f64> {
        let steps = self.steps();
        (step < steps).then(|| match self.warmup_type {
            WarmupType::Log => ((step + 1) as f64).ln() / (steps as f64).ln(),
            WarmupType::Linear => step as f64 / steps as f64,
        })
    }

    /// Returns `past` steps as a fraction of the steps from the end of the warm-up to `total`.
    fn decay_progress(self, past: u64, total: u64) -> f64 {
        past as f64 / total.saturating_sub(self.steps()).max(1) as f64
    }
}

/// One half of a [`OneCycle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HalfCycle {
    /// The number of steps, at least 1.
    pub steps: u64,
    /// The number of stairs in which the learning rate changes; 0 changes it every step.
    pub stairs: u64,
}

impl HalfCycle {
    fn progress(self, step: u64) -> f64 {
        match self.stairs {
            0 => step as f64 / self.steps as f64,
            // Integer arithmetic, so that no stair is lost to rounding.
            stairs => (u128::from(step) * u128::from(stairs) / u128::from(self.steps)) as f64 / stairs as f64,
        }
    }
}

/// The OneCycle schedule: the learning rate goes up and down once, then decays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycle {
    /// The lowest learning rate.
    pub min: f64,
    /// The highest learning rate.
    pub max: f64,
    /// The first half, in which the learning rate goes up.
    pub up: HalfCycle,
    /// The second half, in which the learning rate goes down.
    pub down: HalfCycle,
    /// After the cycle the learning rate is `min / (1 + decay_rate · steps / decay_steps)`.
    pub decay_rate: f64,
    /// The unit of the decay in steps, see `decay_rate`; 0 keeps the learning rate at `min`.
    pub decay_steps: u64,
}

impl OneCycle {
    fn at(&self, step: u64) -> f64 {
        let total = self.up.steps.saturating_add(self.down.steps);
        let done = step + 1;
        if step < total {
            let share = if done <= self.up.steps { self.up.progress(done) } else { self.down.progress(total - done) };
            return self.min + (self.max - self.min) * share;
        }
        if self.decay_steps == 0 {
            return self.min;
        }
        self.min / (1.0 + self.decay_rate * (done - total) as f64 / self.decay_steps as f64)
    }
}

/// A learning-rate schedule of DeepSpeed: the learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DeepSpeedLrSchedule {
    /// WarmupLR: from `min` to `max`, then constant.
    WarmupLr {
        /// The warm-up.
        warmup: Warmup,
        /// The learning rate of the first step.
        min: f64,
        /// The learning rate after the warm-up.
        max: f64,
    },
    /// WarmupDecayLR: from `min` to `max`, then linear decay to `min` at step `total`.
    WarmupDecayLr {
        /// The warm-up.
        warmup: Warmup,
        /// The learning rate of the first step.
        min: f64,
        /// The learning rate after the warm-up.
        max: f64,
        /// The number of steps.
        total: u64,
    },
    /// WarmupCosineLR: from `min_ratio · peak` to `peak`, then cosine decay to `cos_min_ratio · peak`.
    WarmupCosineLr {
        /// The warm-up.
        warmup: Warmup,
        /// The learning rate after the warm-up, which is that of the optimizer.
        peak: f64,
        /// The learning rate of the first step as a fraction of the peak.
        min_ratio: f64,
        /// The learning rate of the last step as a fraction of the peak.
        cos_min_ratio: f64,
        /// The number of steps.
        total: u64,
    },
    /// OneCycle: up and down once, then decay.
    OneCycle(OneCycle),
    /// LRRangeTest: `min · (1 + rate · steps / step_size)`.
    LrRangeTest {
        /// The learning rate before the first step.
        min: f64,
        /// The number of steps in which the factor on `min` grows by `rate`.
        step_size: u64,
        /// The growth of the factor per `step_size` steps.
        rate: f64,
        /// True if the factor grows only every `step_size` steps.
        staircase: bool,
    },
}

impl DeepSpeedLrSchedule {
    /// Returns the learning rate that DeepSpeed's engine applies at `step` of a run, counted from 0. The engine
    /// advances its scheduler after each step, so the first step uses the value that the scheduler sets when it is
    /// created, and the second step uses the first value of the schedule.
    pub fn applied_at(&self, step: u64) -> f64 {
        match (step.checked_sub(1), *self) {
            (Some(before), _) => self.at(before),
            (None, Self::WarmupCosineLr { .. }) => 0.0,
            (None, Self::WarmupLr { min, .. } | Self::WarmupDecayLr { min, .. } | Self::LrRangeTest { min, .. }) => min,
            (None, Self::OneCycle(cycle)) => cycle.min,
        }
    }

    /// Returns the learning rate of the schedule at `step`, counted from 0: DeepSpeed's value at
    /// `last_batch_iteration = step`.
    ///
    /// DeepSpeed's engine advances the scheduler after the optimizer step, so its optimizer step `n` uses the value of
    /// `n - 1` and its step 0 the lowest value of the schedule, see [`DeepSpeedLrSchedule::applied_at`].
    pub fn at(&self, step: u64) -> f64 {
        match *self {
            Self::WarmupLr { warmup, min, max } => min + (max - min) * warmup.progress(step).unwrap_or(1.0),
            Self::WarmupDecayLr { warmup, min, max, total } => {
                let rest = || warmup.decay_progress(total.saturating_sub(step), total);
                min + (max - min) * warmup.progress(step).unwrap_or_else(rest)
            }
            Self::WarmupCosineLr { warmup, peak, min_ratio, cos_min_ratio, total } => match warmup.progress(step) {
                Some(grown) => peak * (min_ratio + (1.0 - min_ratio) * grown),
                None => {
                    let done = warmup.decay_progress(step + 1 - warmup.steps(), total).min(1.0);
                    peak * (cos_min_ratio + (1.0 - cos_min_ratio) * 0.5 * (1.0 + (PI * done).cos()))
                }
            },
            Self::OneCycle(cycle) => cycle.at(step),
            Self::LrRangeTest { min, step_size, rate, staircase } => {
                let size = step_size.max(1);
                let done = if staircase { ((step + 1) / size) as f64 } else { (step + 1) as f64 / size as f64 };
                min * (1.0 + rate * done)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Warmup = Warmup { steps: 10, warmup_type: WarmupType::Log };
    const LINEAR: Warmup = Warmup { steps: 10, warmup_type: WarmupType::Linear };

    fn check(schedule: DeepSpeedLrSchedule, values: &[(u64, f64)]) {
        for (step, expected) in values {
            let found = schedule.at(*step);
            assert!((found - expected).abs() < 5e-9, "{schedule:?} at {step}: expected {expected}, found {found}");
        }
    }

    /// The learning rates that DeepSpeed 0.19.8 applied in its first steps.
    #[test]
    fn a_run_lags_its_scheduler_by_a_step() {
        let schedule = DeepSpeedLrSchedule::WarmupLr {
            warmup: Warmup { steps: 4, warmup_type: WarmupType::Log },
            min: 1e-5,
            max: 1e-4,
        };
        for (step, expected) in [1e-5, 1e-5, 5.5e-5, 8.132331253e-5, 1e-4, 1e-4].into_iter().enumerate() {
            let found = schedule.applied_at(step as u64);
            assert!((found - expected).abs() < 1e-13, "step {step}: {found}");
        }
    }

    /// Values computed from DeepSpeed's source.
    #[test]
    fn the_golden_values_of_the_warm_ups_hold() {
        let (min, max, total) = (0.0, 1e-3, 110);
        let log = [(0, 0.0), (1, 0.30103e-3), (4, 0.69897e-3), (9, 1e-3), (10, 1e-3), (50, 1e-3)];
        check(DeepSpeedLrSchedule::WarmupLr { warmup: LOG, min, max }, &log);
        let linear = [(0, 0.0), (1, 1e-4), (5, 5e-4), (9, 9e-4), (10, 1e-3)];
        check(DeepSpeedLrSchedule::WarmupLr { warmup: LINEAR, min, max }, &linear);
        let decay = [(9, 1e-3), (10, 1e-3), (60, 5e-4), (109, 1e-5), (110, 0.0), (200, 0.0)];
        check(DeepSpeedLrSchedule::WarmupDecayLr { warmup: LOG, min, max, total }, &decay);
        let cosine = [(0, 0.0), (9, 1e-3), (10, 0.99975e-3), (59, 5.0005e-4), (108, 3.47e-7), (109, 1e-7), (200, 1e-7)];
        let schedule =
            DeepSpeedLrSchedule::WarmupCosineLr { warmup: LOG, peak: 1e-3, min_ratio: 0.0, cos_min_ratio: 1e-4, total };
        check(schedule, &cosine);
    }

    #[test]
    fn a_warm_up_starts_where_it_is_told() {
        let (min, max) = (1e-4, 1e-3);
        check(DeepSpeedLrSchedule::WarmupLr { warmup: LINEAR, min, max }, &[(0, 1e-4), (5, 5.5e-4), (10, 1e-3)]);
        check(
            DeepSpeedLrSchedule::WarmupDecayLr { warmup: LINEAR, min, max, total: 20 },
            &[(0, 1e-4), (15, 5.5e-4), (20, 1e-4)],
        );
        let schedule = DeepSpeedLrSchedule::WarmupCosineLr {
            warmup: LINEAR,
            peak: 1e-3,
            min_ratio: 0.1,
            cos_min_ratio: 0.5,
            total: 20,
        };
        check(schedule, &[(0, 1e-4), (5, 5.5e-4), (14, 7.5e-4), (19, 5e-4), (99, 5e-4)]);
    }

    #[test]
    fn short_warm_ups_and_runs_do_not_divide_by_zero() {
        let warmup = Warmup { steps: 1, warmup_type: WarmupType::Log };
        check(DeepSpeedLrSchedule::WarmupLr { warmup, min: 0.0, max: 1.0 }, &[(0, 0.0), (1, 1.0), (2, 1.0)]);
        check(DeepSpeedLrSchedule::WarmupDecayLr { warmup: LOG, min: 0.0, max: 1.0, total: 5 }, &[(9, 1.0), (10, 0.0)]);
        let schedule = DeepSpeedLrSchedule::WarmupCosineLr {
            warmup: LOG,
            peak: 1.0,
            min_ratio: 0.0,
            cos_min_ratio: 1e-4,
            total: 5,
        };
        check(schedule, &[(9, 1.0), (10, 1e-4), (11, 1e-4)]);
    }

    #[test]
    fn one_cycle_goes_up_and_down_and_decays() {
        let half = |steps| HalfCycle { steps, stairs: 0 };
        let cycle = OneCycle { min: 0.1, max: 0.5, up: half(4), down: half(8), decay_rate: 1.0, decay_steps: 10 };
        let values = [(0, 0.2), (3, 0.5), (4, 0.45), (7, 0.3), (11, 0.1), (12, 0.1 / 1.1), (21, 0.1 / 2.0)];
        check(DeepSpeedLrSchedule::OneCycle(cycle), &values);
        check(DeepSpeedLrSchedule::OneCycle(OneCycle { decay_steps: 0, ..cycle }), &[(11, 0.1), (12, 0.1), (99, 0.1)]);
        check(DeepSpeedLrSchedule::OneCycle(OneCycle { decay_rate: 0.0, ..cycle }), &[(12, 0.1), (99, 0.1)]);

        let stairs =
            OneCycle { up: HalfCycle { steps: 4, stairs: 2 }, down: HalfCycle { steps: 3, stairs: 1 }, ..cycle };
        let values = [(0, 0.1), (1, 0.3), (2, 0.3), (3, 0.5), (4, 0.1), (5, 0.1), (6, 0.1)];
        check(DeepSpeedLrSchedule::OneCycle(stairs), &values);
    }

    #[test]
    fn the_range_test_grows() {
        let schedule = |staircase| DeepSpeedLrSchedule::LrRangeTest { min: 1e-3, step_size: 4, rate: 2.0, staircase };
        check(schedule(false), &[(0, 1.5e-3), (3, 3e-3), (5, 4e-3)]);
        check(schedule(true), &[(0, 1e-3), (2, 1e-3), (3, 3e-3), (6, 3e-3), (7, 5e-3)]);
    }
}
