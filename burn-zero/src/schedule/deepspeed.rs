//! DeepSpeed's learning rate schedules, with its parameters and formulas (`runtime/lr_schedules.py`).

use std::f64::consts::PI;

/// How the warm-up grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarmupType {
    /// With the logarithm of the step.
    Log,
    /// With the step.
    Linear,
}

/// The first part of the three warm-up schedules.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    /// The number of steps, at least 2 in effect: DeepSpeed divides by its logarithm.
    pub steps: u64,
    /// How the warm-up grows.
    pub form: WarmupType,
}

impl Warmup {
    fn steps(self) -> u64 {
        self.steps.max(2)
    }

    /// From 0 to 1, and `None` after the warm-up.
    fn grown(self, step: u64) -> Option<f64> {
        let steps = self.steps();
        (step < steps).then(|| match self.form {
            WarmupType::Log => ((step + 1) as f64).ln() / (steps as f64).ln(),
            WarmupType::Linear => step as f64 / steps as f64,
        })
    }

    /// The share of the steps from the warm-up's end to `total` that `past` steps after it are.
    fn share(self, past: u64, total: u64) -> f64 {
        past as f64 / total.saturating_sub(self.steps()).max(1) as f64
    }
}

/// One half of a [`OneCycle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HalfCycle {
    /// The number of steps, at least 1.
    pub steps: u64,
    /// In how many stairs the learning rate moves; 0 moves it every step.
    pub stairs: u64,
}

impl HalfCycle {
    fn share(self, step: u64) -> f64 {
        match self.stairs {
            0 => step as f64 / self.steps as f64,
            // In whole numbers, so that no stair is lost to rounding.
            stairs => (u128::from(step) * u128::from(stairs) / u128::from(self.steps)) as f64 / stairs as f64,
        }
    }
}

/// Up and down once, then decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycle {
    /// The lowest learning rate.
    pub min: f64,
    /// The highest learning rate.
    pub max: f64,
    /// The way up.
    pub up: HalfCycle,
    /// The way down.
    pub down: HalfCycle,
    /// After the cycle the learning rate is `min / (1 + decay_rate · steps / decay_steps)`.
    pub decay_rate: f64,
    /// See `decay_rate`; 0 keeps `min`.
    pub decay_steps: u64,
}

impl OneCycle {
    fn at(&self, step: u64) -> f64 {
        let total = self.up.steps.saturating_add(self.down.steps);
        let done = step + 1;
        if step < total {
            let share = if done <= self.up.steps { self.up.share(done) } else { self.down.share(total - done) };
            return self.min + (self.max - self.min) * share;
        }
        if self.decay_steps == 0 {
            return self.min;
        }
        self.min / (1.0 + self.decay_rate * (done - total) as f64 / self.decay_steps as f64)
    }
}

/// A schedule of DeepSpeed's: the learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DeepSpeed {
    /// WarmupLR: from `min` to `max`, then constant.
    WarmupLr {
        /// The warm-up.
        warmup: Warmup,
        /// The learning rate of the first step.
        min: f64,
        /// The learning rate after the warm-up.
        max: f64,
    },
    /// WarmupDecayLR: from `min` to `max`, then linearly to `min` at step `total`.
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
    /// WarmupCosineLR: from `min_ratio` to all of `peak`, then half a cosine down to `cos_min_ratio` of it.
    WarmupCosineLr {
        /// The warm-up.
        warmup: Warmup,
        /// The learning rate after the warm-up: the optimizer's.
        peak: f64,
        /// The share of the peak in the first step.
        min_ratio: f64,
        /// The share of the peak in the last step.
        cos_min_ratio: f64,
        /// The number of steps.
        total: u64,
    },
    /// OneCycle.
    OneCycle(OneCycle),
    /// LRRangeTest: `min · (1 + rate · steps / step_size)`.
    LrRangeTest {
        /// The learning rate before the first step.
        min: f64,
        /// The number of steps in which the factor grows by `rate`.
        step_size: u64,
        /// See `step_size`.
        rate: f64,
        /// Whether the factor grows only every `step_size` steps.
        staircase: bool,
    },
}

impl DeepSpeed {
    /// The learning rate of `step` of a run, counted from 0. DeepSpeed's engine asks its scheduler after a step: the first one is
    /// taken with what the scheduler sets when it is made, the second with its first value.
    pub fn in_run(&self, step: u64) -> f64 {
        match (step.checked_sub(1), *self) {
            (Some(before), _) => self.at(before),
            (None, Self::WarmupCosineLr { .. }) => 0.0,
            (None, Self::WarmupLr { min, .. } | Self::WarmupDecayLr { min, .. } | Self::LrRangeTest { min, .. }) => min,
            (None, Self::OneCycle(cycle)) => cycle.min,
        }
    }

    /// The learning rate of `step`, counted from 0: DeepSpeed's value at `last_batch_iteration = step`.
    ///
    /// DeepSpeed's engine moves the scheduler after the optimizer has stepped, so there the optimizer's step `n` uses the value
    /// of `n - 1`, and step 0 the schedule's lowest.
    pub fn at(&self, step: u64) -> f64 {
        match *self {
            Self::WarmupLr { warmup, min, max } => min + (max - min) * warmup.grown(step).unwrap_or(1.0),
            Self::WarmupDecayLr { warmup, min, max, total } => {
                let rest = || warmup.share(total.saturating_sub(step), total);
                min + (max - min) * warmup.grown(step).unwrap_or_else(rest)
            }
            Self::WarmupCosineLr { warmup, peak, min_ratio, cos_min_ratio, total } => match warmup.grown(step) {
                Some(grown) => peak * (min_ratio + (1.0 - min_ratio) * grown),
                None => {
                    let done = warmup.share(step + 1 - warmup.steps(), total).min(1.0);
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

    const LOG: Warmup = Warmup { steps: 10, form: WarmupType::Log };
    const LINEAR: Warmup = Warmup { steps: 10, form: WarmupType::Linear };

    fn check(schedule: DeepSpeed, values: &[(u64, f64)]) {
        for (step, expected) in values {
            let found = schedule.at(*step);
            assert!((found - expected).abs() < 5e-9, "{schedule:?} at {step}: expected {expected}, found {found}");
        }
    }

    /// Computed from DeepSpeed's source.
    /// What DeepSpeed 0.19.8 trained its first steps with.
    #[test]
    fn a_run_lags_its_scheduler_by_a_step() {
        let schedule = DeepSpeed::WarmupLr { warmup: Warmup { steps: 4, form: WarmupType::Log }, min: 1e-5, max: 1e-4 };
        for (step, expected) in [1e-5, 1e-5, 5.5e-5, 8.132331253e-5, 1e-4, 1e-4].into_iter().enumerate() {
            let found = schedule.in_run(step as u64);
            assert!((found - expected).abs() < 1e-13, "step {step}: {found}");
        }
    }

    #[test]
    fn the_golden_values_of_the_warm_ups_hold() {
        let (min, max, total) = (0.0, 1e-3, 110);
        let log = [(0, 0.0), (1, 0.30103e-3), (4, 0.69897e-3), (9, 1e-3), (10, 1e-3), (50, 1e-3)];
        check(DeepSpeed::WarmupLr { warmup: LOG, min, max }, &log);
        let linear = [(0, 0.0), (1, 1e-4), (5, 5e-4), (9, 9e-4), (10, 1e-3)];
        check(DeepSpeed::WarmupLr { warmup: LINEAR, min, max }, &linear);
        let decay = [(9, 1e-3), (10, 1e-3), (60, 5e-4), (109, 1e-5), (110, 0.0), (200, 0.0)];
        check(DeepSpeed::WarmupDecayLr { warmup: LOG, min, max, total }, &decay);
        let cosine = [(0, 0.0), (9, 1e-3), (10, 0.99975e-3), (59, 5.0005e-4), (108, 3.47e-7), (109, 1e-7), (200, 1e-7)];
        let schedule =
            DeepSpeed::WarmupCosineLr { warmup: LOG, peak: 1e-3, min_ratio: 0.0, cos_min_ratio: 1e-4, total };
        check(schedule, &cosine);
    }

    #[test]
    fn a_warm_up_starts_where_it_is_told() {
        let (min, max) = (1e-4, 1e-3);
        check(DeepSpeed::WarmupLr { warmup: LINEAR, min, max }, &[(0, 1e-4), (5, 5.5e-4), (10, 1e-3)]);
        check(DeepSpeed::WarmupDecayLr { warmup: LINEAR, min, max, total: 20 }, &[(0, 1e-4), (15, 5.5e-4), (20, 1e-4)]);
        let schedule =
            DeepSpeed::WarmupCosineLr { warmup: LINEAR, peak: 1e-3, min_ratio: 0.1, cos_min_ratio: 0.5, total: 20 };
        check(schedule, &[(0, 1e-4), (5, 5.5e-4), (14, 7.5e-4), (19, 5e-4), (99, 5e-4)]);
    }

    #[test]
    fn short_warm_ups_and_runs_do_not_divide_by_zero() {
        let warmup = Warmup { steps: 1, form: WarmupType::Log };
        check(DeepSpeed::WarmupLr { warmup, min: 0.0, max: 1.0 }, &[(0, 0.0), (1, 1.0), (2, 1.0)]);
        check(DeepSpeed::WarmupDecayLr { warmup: LOG, min: 0.0, max: 1.0, total: 5 }, &[(9, 1.0), (10, 0.0)]);
        let schedule =
            DeepSpeed::WarmupCosineLr { warmup: LOG, peak: 1.0, min_ratio: 0.0, cos_min_ratio: 1e-4, total: 5 };
        check(schedule, &[(9, 1.0), (10, 1e-4), (11, 1e-4)]);
    }

    #[test]
    fn one_cycle_goes_up_and_down_and_decays() {
        let half = |steps| HalfCycle { steps, stairs: 0 };
        let cycle = OneCycle { min: 0.1, max: 0.5, up: half(4), down: half(8), decay_rate: 1.0, decay_steps: 10 };
        let values = [(0, 0.2), (3, 0.5), (4, 0.45), (7, 0.3), (11, 0.1), (12, 0.1 / 1.1), (21, 0.1 / 2.0)];
        check(DeepSpeed::OneCycle(cycle), &values);
        check(DeepSpeed::OneCycle(OneCycle { decay_steps: 0, ..cycle }), &[(11, 0.1), (12, 0.1), (99, 0.1)]);
        check(DeepSpeed::OneCycle(OneCycle { decay_rate: 0.0, ..cycle }), &[(12, 0.1), (99, 0.1)]);

        let stairs =
            OneCycle { up: HalfCycle { steps: 4, stairs: 2 }, down: HalfCycle { steps: 3, stairs: 1 }, ..cycle };
        let values = [(0, 0.1), (1, 0.3), (2, 0.3), (3, 0.5), (4, 0.1), (5, 0.1), (6, 0.1)];
        check(DeepSpeed::OneCycle(stairs), &values);
    }

    #[test]
    fn the_range_test_grows() {
        let schedule = |staircase| DeepSpeed::LrRangeTest { min: 1e-3, step_size: 4, rate: 2.0, staircase };
        check(schedule(false), &[(0, 1.5e-3), (3, 3e-3), (5, 4e-3)]);
        check(schedule(true), &[(0, 1e-3), (2, 1e-3), (3, 3e-3), (6, 3e-3), (7, 5e-3)]);
    }
}
