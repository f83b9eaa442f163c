//! The scheduler's type and parameters, with DeepSpeed's defaults.

use crate::lr_schedule::{DeepSpeedLrSchedule, HalfCycle, OneCycle, Warmup, WarmupType};

/// The parameters of WarmupLR.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupLrParams {
    /// The learning rate of the first step.
    pub(super) warmup_min_lr: f64,
    /// The learning rate after the warm-up; by default that of the optimizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) warmup_max_lr: Option<f64>,
    /// The number of warm-up steps.
    pub(super) warmup_num_steps: u64,
    /// The form of the warm-up.
    pub(super) warmup_type: WarmupType,
}

impl Default for WarmupLrParams {
    fn default() -> Self {
        Self { warmup_min_lr: 0.0, warmup_max_lr: None, warmup_num_steps: 1000, warmup_type: WarmupType::Log }
    }
}

/// The parameters of WarmupDecayLR.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupDecayLrParams {
    /// The number of steps of the run.
    pub(super) total_num_steps: u64,
    /// The learning rate of the first step.
    pub(super) warmup_min_lr: f64,
    /// The learning rate after the warm-up.
    pub(super) warmup_max_lr: f64,
    /// The number of warm-up steps.
    pub(super) warmup_num_steps: u64,
    /// The form of the warm-up.
    pub(super) warmup_type: WarmupType,
}

impl Default for WarmupDecayLrParams {
    fn default() -> Self {
        let WarmupLrParams { warmup_min_lr, warmup_num_steps, warmup_type, .. } = WarmupLrParams::default();
        Self { total_num_steps: 1, warmup_min_lr, warmup_max_lr: 1e-3, warmup_num_steps, warmup_type }
    }
}

/// The parameters of WarmupCosineLR, whose peak is the learning rate of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupCosineLrParams {
    /// The number of steps of the run.
    pub(super) total_num_steps: u64,
    /// The learning rate of the first step as a fraction of the peak.
    pub(super) warmup_min_ratio: f64,
    /// The number of warm-up steps.
    pub(super) warmup_num_steps: u64,
    /// The learning rate of the last step as a fraction of the peak.
    pub(super) cos_min_ratio: f64,
    /// The form of the warm-up.
    pub(super) warmup_type: WarmupType,
}

impl Default for WarmupCosineLrParams {
    fn default() -> Self {
        let WarmupLrParams { warmup_num_steps, warmup_type, .. } = WarmupLrParams::default();
        Self { total_num_steps: 1, warmup_min_ratio: 0.0, warmup_num_steps, cos_min_ratio: 1e-4, warmup_type }
    }
}

/// The parameters of OneCycle. The momentum is not cycled.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct OneCycleParams {
    /// The lowest learning rate.
    pub(super) cycle_min_lr: f64,
    /// The highest learning rate.
    pub(super) cycle_max_lr: f64,
    /// The decay rate of the learning rate per `decay_step_size` steps after the cycle.
    pub(super) decay_lr_rate: f64,
    /// The number of steps up.
    pub(super) cycle_first_step_size: u64,
    /// The number of steps down; by default as many as up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cycle_second_step_size: Option<u64>,
    /// The number of stairs up; 0 for none.
    pub(super) cycle_first_stair_count: u64,
    /// The number of stairs down; by default as many as up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cycle_second_stair_count: Option<u64>,
    /// The unit of `decay_lr_rate` in steps; 0 for no decay.
    pub(super) decay_step_size: u64,
}

impl Default for OneCycleParams {
    fn default() -> Self {
        Self {
            cycle_min_lr: 0.0,
            cycle_max_lr: 0.0,
            decay_lr_rate: 0.0,
            cycle_first_step_size: 2000,
            cycle_second_step_size: None,
            cycle_first_stair_count: 0,
            cycle_second_stair_count: None,
            decay_step_size: 0,
        }
    }
}

/// The parameters of LRRangeTest.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct LrRangeTestParams {
    /// The learning rate before the first step.
    pub(super) lr_range_test_min_lr: f64,
    /// The number of steps in which the factor on the minimum grows by the rate.
    pub(super) lr_range_test_step_size: u64,
    /// The growth of the factor per `lr_range_test_step_size` steps.
    pub(super) lr_range_test_step_rate: f64,
    /// True if the factor grows only every `lr_range_test_step_size` steps.
    pub(super) lr_range_test_staircase: bool,
}

impl Default for LrRangeTestParams {
    fn default() -> Self {
        Self {
            lr_range_test_min_lr: 1e-3,
            lr_range_test_step_size: 2000,
            lr_range_test_step_rate: 1.0,
            lr_range_test_staircase: false,
        }
    }
}

/// The `scheduler` block.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "params")]
pub enum SchedulerConfig {
    /// Warm-up, then constant.
    #[serde(rename = "WarmupLR")]
    WarmupLr(WarmupLrParams),
    /// Warm-up, then linear decay.
    #[serde(rename = "WarmupDecayLR")]
    WarmupDecayLr(WarmupDecayLrParams),
    /// Warm-up, then cosine decay.
    #[serde(rename = "WarmupCosineLR")]
    WarmupCosineLr(WarmupCosineLrParams),
    /// Up and down once, then decay.
    OneCycle(OneCycleParams),
    /// Growth without end, to find the largest learning rate with which training is stable.
    #[serde(rename = "LRRangeTest")]
    LrRangeTest(LrRangeTestParams),
}

impl SchedulerConfig {
    /// Returns the learning-rate schedule for an optimizer with this learning rate.
    pub fn lr_schedule(&self, learning_rate: f64) -> DeepSpeedLrSchedule {
        let warmup = |steps, form| Warmup { steps, warmup_type: form };
        match *self {
            Self::WarmupLr(it) => DeepSpeedLrSchedule::WarmupLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                min: it.warmup_min_lr,
                max: it.warmup_max_lr.unwrap_or(learning_rate),
            },
            Self::WarmupDecayLr(it) => DeepSpeedLrSchedule::WarmupDecayLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                min: it.warmup_min_lr,
                max: it.warmup_max_lr,
                total: it.total_num_steps,
            },
            Self::WarmupCosineLr(it) => DeepSpeedLrSchedule::WarmupCosineLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                peak: learning_rate,
                min_ratio: it.warmup_min_ratio,
                cos_min_ratio: it.cos_min_ratio,
                total: it.total_num_steps,
            },
            Self::OneCycle(it) => DeepSpeedLrSchedule::OneCycle(it.one_cycle()),
            Self::LrRangeTest(it) => DeepSpeedLrSchedule::LrRangeTest {
                min: it.lr_range_test_min_lr,
                step_size: it.lr_range_test_step_size,
                rate: it.lr_range_test_step_rate,
                staircase: it.lr_range_test_staircase,
            },
        }
    }
}

impl OneCycleParams {
    fn one_cycle(&self) -> OneCycle {
        let (up, stairs) = (self.cycle_first_step_size, self.cycle_first_stair_count);
        OneCycle {
            min: self.cycle_min_lr,
            max: self.cycle_max_lr,
            up: HalfCycle { steps: up, stairs },
            down: HalfCycle {
                steps: self.cycle_second_step_size.unwrap_or(up),
                stairs: self.cycle_second_stair_count.unwrap_or(stairs),
            },
            decay_rate: self.decay_lr_rate,
            decay_steps: self.decay_step_size,
        }
    }
}
