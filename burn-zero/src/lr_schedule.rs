//! Learning-rate schedules: the learning rate as a function of the step.

mod deepspeed;

pub use deepspeed::{DeepSpeedLrSchedule, HalfCycle, OneCycle, Warmup, WarmupType};

use std::f64::consts::PI;

/// The kind of a learning-rate schedule. DeepSpeed's schedules keep its names and formulas (`runtime/lr_schedules.py`);
/// the others are those of `transformers`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum LrKind {
    /// Constant from the first step on; without a warm-up, whatever its length.
    #[serde(rename = "constant")]
    Constant,
    /// Linear warm-up, then constant.
    #[serde(rename = "constant_with_warmup")]
    ConstantWithWarmup,
    /// Linear warm-up, then linear decay to 0 at the last step.
    #[serde(rename = "linear")]
    Linear,
    /// Linear warm-up, then cosine decay to 0 at the last step.
    #[default]
    #[serde(rename = "cosine")]
    Cosine,
    /// DeepSpeed's WarmupLR: logarithmic warm-up, then constant.
    #[serde(rename = "WarmupLR")]
    WarmupLr,
    /// DeepSpeed's WarmupDecayLR: logarithmic warm-up, then linear decay to 0.
    #[serde(rename = "WarmupDecayLR")]
    WarmupDecayLr,
    /// DeepSpeed's WarmupCosineLR: logarithmic warm-up, then cosine decay to 1e-4 of the peak.
    #[serde(rename = "WarmupCosineLR")]
    WarmupCosineLr,
}

/// The learning rate of every step of a run. It is a pure function of the step, so that a resumed run needs nothing
/// else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The kind of schedule.
    pub kind: LrKind,
    /// The peak learning rate.
    pub peak: f64,
    /// The number of warm-up steps.
    pub warmup: usize,
    /// The number of steps of the run.
    pub total: usize,
}

impl LrSchedule {
    /// Returns the learning rate of `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        let warmup = Warmup { steps: self.warmup as u64, warmup_type: WarmupType::Log };
        let (min, max, total) = (0.0, self.peak, self.total as u64);
        let deepspeed = match self.kind {
            LrKind::Constant => return self.peak,
            LrKind::ConstantWithWarmup | LrKind::Linear | LrKind::Cosine => return self.peak * self.ratio(step),
            LrKind::WarmupLr => DeepSpeedLrSchedule::WarmupLr { warmup, min, max },
            LrKind::WarmupDecayLr => DeepSpeedLrSchedule::WarmupDecayLr { warmup, min, max, total },
            LrKind::WarmupCosineLr => {
                DeepSpeedLrSchedule::WarmupCosineLr { warmup, peak: max, min_ratio: 0.0, cos_min_ratio: 1e-4, total }
            }
        };
        deepspeed.at(step as u64)
    }

    /// Returns the fraction of the peak, for the schedules that are not DeepSpeed's.
    fn ratio(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            LrKind::Linear => (1.0 - done).max(0.0),
            LrKind::Cosine => 0.5 * (1.0 + (PI * done.min(1.0)).cos()),
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values computed from DeepSpeed's source. The table: (kind, total steps, [(step, learning rate for a peak of
    /// 1)]).
    #[test]
    fn the_golden_values_of_deepspeed_hold() {
        let table = [
            (LrKind::WarmupLr, 110, [(0, 0.0), (1, 2f64.log10()), (4, 0.69897), (9, 1.0), (10, 1.0), (50, 1.0)]),
            (LrKind::WarmupDecayLr, 110, [(9, 1.0), (10, 1.0), (60, 0.5), (109, 0.01), (110, 0.0), (200, 0.0)]),
            (
                LrKind::WarmupCosineLr,
                110,
                [(0, 0.0), (9, 1.0), (10, 0.999753), (59, 0.50005), (108, 0.000347), (200, 1e-4)],
            ),
            (LrKind::Linear, 110, [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (109, 0.01), (110, 0.0)]),
            (LrKind::Cosine, 110, [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (35, 0.853553), (110, 0.0)]),
            (LrKind::ConstantWithWarmup, 110, [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (60, 1.0), (110, 1.0)]),
            (LrKind::Constant, 110, [(0, 1.0), (1, 1.0), (5, 1.0), (10, 1.0), (60, 1.0), (110, 1.0)]),
        ];
        for (kind, total, values) in table {
            let schedule = LrSchedule { kind, peak: 1e-3, warmup: 10, total };
            for (step, expected) in values {
                let found = schedule.at(step) / 1e-3;
                assert!((found - expected).abs() < 2e-6, "{kind:?} at {step}: expected {expected}, found {found}");
            }
        }
    }

    #[test]
    fn names_are_read_and_unknown_ones_refused() {
        let read = |name: &str| serde_json::from_value::<LrKind>(name.into());
        assert_eq!(read("WarmupDecayLR").unwrap(), LrKind::WarmupDecayLr);
        assert!(read("warmup").unwrap_err().to_string().contains("WarmupCosineLR"));
    }
}
