//! Learning rates as functions of the step.

mod deepspeed;

pub use deepspeed::{DeepSpeed, HalfCycle, OneCycle, Warmup, WarmupType};

use crate::Error;
use std::f64::consts::PI;

/// How the learning rate moves. DeepSpeed's schedules keep its names and formulas (`runtime/lr_schedules.py`); the others are
/// `transformers`'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Linear warm-up, then constant.
    Constant,
    /// Linear warm-up, then linearly to 0 at the last step.
    Linear,
    /// Linear warm-up, then half a cosine to 0 at the last step.
    Cosine,
    /// DeepSpeed's WarmupLR: logarithmic warm-up, then constant.
    WarmupLr,
    /// DeepSpeed's WarmupDecayLR: logarithmic warm-up, then linearly to 0.
    WarmupDecayLr,
    /// DeepSpeed's WarmupCosineLR: logarithmic warm-up, then half a cosine to 1e-4 of the peak.
    WarmupCosineLr,
}

impl std::str::FromStr for Kind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "constant" => Self::Constant,
            "linear" => Self::Linear,
            "cosine" => Self::Cosine,
            "WarmupLR" => Self::WarmupLr,
            "WarmupDecayLR" => Self::WarmupDecayLr,
            "WarmupCosineLR" => Self::WarmupCosineLr,
            found => {
                return Err(Error::Setting {
                    field: "scheduler",
                    expected: "constant, linear, cosine, WarmupLR, WarmupDecayLR or WarmupCosineLR",
                    found: found.to_owned(),
                });
            }
        })
    }
}

/// A learning rate for every step of a run: a pure function, so that resuming needs nothing but the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The form.
    pub kind: Kind,
    /// The learning rate at its peak.
    pub peak: f64,
    /// The number of warm-up steps.
    pub warmup: usize,
    /// The number of steps of the run.
    pub total: usize,
}

impl Schedule {
    /// The learning rate of `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        let warmup = Warmup { steps: self.warmup as u64, form: WarmupType::Log };
        let (min, max, total) = (0.0, self.peak, self.total as u64);
        let deepspeed = match self.kind {
            Kind::Constant | Kind::Linear | Kind::Cosine => return self.peak * self.ratio(step),
            Kind::WarmupLr => DeepSpeed::WarmupLr { warmup, min, max },
            Kind::WarmupDecayLr => DeepSpeed::WarmupDecayLr { warmup, min, max, total },
            Kind::WarmupCosineLr => {
                DeepSpeed::WarmupCosineLr { warmup, peak: max, min_ratio: 0.0, cos_min_ratio: 1e-4, total }
            }
        };
        deepspeed.at(step as u64)
    }

    /// The share of the peak, of the schedules that are not DeepSpeed's.
    fn ratio(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            Kind::Linear => (1.0 - done).max(0.0),
            Kind::Cosine => 0.5 * (1.0 + (PI * done.min(1.0)).cos()),
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DeepSpeed's values, computed from its source: (kind, total, step, learning rate at a peak of 1e-3).
    #[test]
    fn the_golden_values_of_deepspeed_hold() {
        let table = [
            (Kind::WarmupLr, 110, [(0, 0.0), (1, 2f64.log10()), (4, 0.69897), (9, 1.0), (10, 1.0), (50, 1.0)]),
            (Kind::WarmupDecayLr, 110, [(9, 1.0), (10, 1.0), (60, 0.5), (109, 0.01), (110, 0.0), (200, 0.0)]),
            (
                Kind::WarmupCosineLr,
                110,
                [(0, 0.0), (9, 1.0), (10, 0.999753), (59, 0.50005), (108, 0.000347), (200, 1e-4)],
            ),
            (Kind::Linear, 110, [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (109, 0.01), (110, 0.0)]),
            (Kind::Cosine, 110, [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (35, 0.853553), (110, 0.0)]),
            (Kind::Constant, 110, [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (60, 1.0), (110, 1.0)]),
        ];
        for (kind, total, values) in table {
            let schedule = Schedule { kind, peak: 1e-3, warmup: 10, total };
            for (step, expected) in values {
                let found = schedule.at(step) / 1e-3;
                assert!((found - expected).abs() < 2e-6, "{kind:?} at {step}: expected {expected}, found {found}");
            }
        }
    }

    #[test]
    fn names_are_read_and_unknown_ones_refused() {
        assert_eq!("WarmupDecayLR".parse::<Kind>().unwrap(), Kind::WarmupDecayLr);
        assert!("warmup".parse::<Kind>().unwrap_err().to_string().contains("WarmupCosineLR"));
    }
}
