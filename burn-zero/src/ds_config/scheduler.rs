//! The scheduler's type and parameters, with DeepSpeed's defaults.

use crate::schedule::{DeepSpeed, HalfCycle, OneCycle, Warmup, WarmupType};

/// The parameters of WarmupLR.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupLr {
    /// The learning rate of the first step.
    pub warmup_min_lr: f64,
    /// The learning rate after the warm-up; the optimizer's if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_max_lr: Option<f64>,
    /// The number of warm-up steps.
    pub warmup_num_steps: u64,
    /// How the warm-up grows.
    pub warmup_type: WarmupType,
}

impl Default for WarmupLr {
    fn default() -> Self {
        Self { warmup_min_lr: 0.0, warmup_max_lr: None, warmup_num_steps: 1000, warmup_type: WarmupType::Log }
    }
}

/// The parameters of WarmupDecayLR.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupDecayLr {
    /// The number of steps of the run.
    pub total_num_steps: u64,
    /// The learning rate of the first step.
    pub warmup_min_lr: f64,
    /// The learning rate after the warm-up.
    pub warmup_max_lr: f64,
    /// The number of warm-up steps.
    pub warmup_num_steps: u64,
    /// How the warm-up grows.
    pub warmup_type: WarmupType,
}

impl Default for WarmupDecayLr {
    fn default() -> Self {
        let WarmupLr { warmup_min_lr, warmup_num_steps, warmup_type, .. } = WarmupLr::default();
        Self { total_num_steps: 1, warmup_min_lr, warmup_max_lr: 1e-3, warmup_num_steps, warmup_type }
    }
}

/// The parameters of WarmupCosineLR; its peak is the optimizer's learning rate.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WarmupCosineLr {
    /// The number of steps of the run.
    pub total_num_steps: u64,
    /// The share of the peak in the first step.
    pub warmup_min_ratio: f64,
    /// The number of warm-up steps.
    pub warmup_num_steps: u64,
    /// The share of the peak in the last step.
    pub cos_min_ratio: f64,
    /// How the warm-up grows.
    pub warmup_type: WarmupType,
}

impl Default for WarmupCosineLr {
    fn default() -> Self {
        let WarmupLr { warmup_num_steps, warmup_type, .. } = WarmupLr::default();
        Self { total_num_steps: 1, warmup_min_ratio: 0.0, warmup_num_steps, cos_min_ratio: 1e-4, warmup_type }
    }
}

/// The parameters of OneCycle. The momentum is not cycled.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Cycle {
    /// The lowest learning rate.
    pub cycle_min_lr: f64,
    /// The highest learning rate.
    pub cycle_max_lr: f64,
    /// By how much the learning rate decays in `decay_step_size` steps after the cycle.
    pub decay_lr_rate: f64,
    /// The steps up.
    pub cycle_first_step_size: u64,
    /// The steps down; as many as up if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cycle_second_step_size: Option<u64>,
    /// The stairs up; 0 for none.
    pub cycle_first_stair_count: u64,
    /// The stairs down; as many as up if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cycle_second_stair_count: Option<u64>,
    /// See `decay_lr_rate`; 0 for no decay.
    pub decay_step_size: u64,
}

impl Default for Cycle {
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
pub struct RangeTest {
    /// The learning rate before the first step.
    pub lr_range_test_min_lr: f64,
    /// The number of steps in which the factor grows by the rate.
    pub lr_range_test_step_size: u64,
    /// See `lr_range_test_step_size`.
    pub lr_range_test_step_rate: f64,
    /// Whether the factor grows only every `lr_range_test_step_size` steps.
    pub lr_range_test_staircase: bool,
}

impl Default for RangeTest {
    fn default() -> Self {
        Self {
            lr_range_test_min_lr: 1e-3,
            lr_range_test_step_size: 2000,
            lr_range_test_step_rate: 1.0,
            lr_range_test_staircase: false,
        }
    }
}

/// `scheduler`.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "params")]
pub enum Scheduler {
    /// A warm-up, then constant.
    #[serde(rename = "WarmupLR")]
    WarmupLr(WarmupLr),
    /// A warm-up, then linearly down.
    #[serde(rename = "WarmupDecayLR")]
    WarmupDecayLr(WarmupDecayLr),
    /// A warm-up, then half a cosine down.
    #[serde(rename = "WarmupCosineLR")]
    WarmupCosineLr(WarmupCosineLr),
    /// Up and down once.
    OneCycle(Cycle),
    /// Ever upward, to find the largest learning rate that trains.
    #[serde(rename = "LRRangeTest")]
    LrRangeTest(RangeTest),
}

impl Scheduler {
    /// The learning rate as a function of the step, for an optimizer with `learning_rate`.
    pub fn schedule(&self, learning_rate: f64) -> DeepSpeed {
        let warmup = |steps, form| Warmup { steps, form };
        match *self {
            Self::WarmupLr(it) => DeepSpeed::WarmupLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                min: it.warmup_min_lr,
                max: it.warmup_max_lr.unwrap_or(learning_rate),
            },
            Self::WarmupDecayLr(it) => DeepSpeed::WarmupDecayLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                min: it.warmup_min_lr,
                max: it.warmup_max_lr,
                total: it.total_num_steps,
            },
            Self::WarmupCosineLr(it) => DeepSpeed::WarmupCosineLr {
                warmup: warmup(it.warmup_num_steps, it.warmup_type),
                peak: learning_rate,
                min_ratio: it.warmup_min_ratio,
                cos_min_ratio: it.cos_min_ratio,
                total: it.total_num_steps,
            },
            Self::OneCycle(it) => DeepSpeed::OneCycle(it.cycle()),
            Self::LrRangeTest(it) => DeepSpeed::LrRangeTest {
                min: it.lr_range_test_min_lr,
                step_size: it.lr_range_test_step_size,
                rate: it.lr_range_test_step_rate,
                staircase: it.lr_range_test_staircase,
            },
        }
    }
}

impl Cycle {
    fn cycle(&self) -> OneCycle {
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
