//! AdaLoRA's fields beyond LoRA's.

use super::{InitLoraWeights, LoraConfig};
use crate::Error;
use serde::{Deserialize, Serialize};

/// AdaLoRA's schedule of ranks: the fields of PEFT's `AdaLoraConfig` beyond LoRA's, with its defaults. The initial rank
/// `init_r` is [`LoraConfig::r`](crate::LoraConfig::r).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaLoraConfig {
    /// The mean rank of a layer in the end.
    pub target_r: usize,
    /// The number of steps before the first allocation, in which every layer keeps its initial rank.
    pub tinit: usize,
    /// The number of steps after the last allocation.
    pub tfinal: usize,
    /// The number of steps from one allocation to the next.
    #[serde(rename = "deltaT")]
    pub delta_t: usize,
    /// The decay rate of the mean importance.
    pub beta1: f64,
    /// The decay rate of the mean deviation of the importance from its mean.
    pub beta2: f64,
    /// The coefficient of the loss that keeps the rows of `A` and the columns of `B` orthonormal.
    pub orth_reg_weight: f64,
    /// The number of steps of the training run.
    pub total_step: usize,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        Self {
            target_r: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: 0,
        }
    }
}

impl AdaLoraConfig {
    /// Checks the values for an initial rank of `init_r`.
    ///
    /// # Errors
    /// If a value is invalid; names the field, the value and the valid values.
    pub fn check(&self, init_r: usize) -> Result<(), Error> {
        let Self { target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight, total_step } = *self;
        let refuse = |field: &str, expected: &str, found: String| {
            Err(Error::config(format!("`{field}`: expected {expected}, found {found}")))
        };
        if target_r == 0 || target_r > init_r {
            return refuse("target_r", &format!("1 to `init_r`, which is {init_r}"), target_r.to_string());
        }
        if delta_t == 0 {
            return refuse("deltaT", "a positive integer", delta_t.to_string());
        }
        for (field, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return refuse(field, "a number between 0 and 1", beta.to_string());
            }
        }
        if !(orth_reg_weight >= 0.0 && orth_reg_weight.is_finite()) {
            return refuse("orth_reg_weight", "a number, 0 or more", orth_reg_weight.to_string());
        }
        if tinit.saturating_add(tfinal) >= total_step {
            let expected =
                format!("more steps than `tinit` and `tfinal`, which are {tinit} and {tfinal}, to allocate in");
            return refuse("total_step", &expected, total_step.to_string());
        }
        Ok(())
    }

    /// Returns the step, counted from 1, at which ranks are allocated for the last time.
    pub(crate) fn last_allocation(&self) -> usize {
        self.total_step - self.tfinal
    }

    /// Returns the sum of all ranks that `step`, counted from 1, allocates; `None` if it allocates nothing. Ranks fall
    /// from `initial` to `target` with the cube of the steps that are left.
    pub(crate) fn budget(&self, step: usize, [initial, target]: [usize; 2]) -> Option<usize> {
        let last = self.last_allocation();
        if step == last {
            return Some(target);
        }
        if step <= self.tinit || step > last || !step.is_multiple_of(self.delta_t) {
            return None;
        }
        let left = 1.0 - (step - self.tinit) as f64 / (last - self.tinit) as f64;
        Some(((initial - target) as f64 * left.powi(3) + target as f64) as usize)
    }
}

impl LoraConfig {
    /// Checks AdaLoRA's fields and that the others go with them.
    pub(super) fn check_adalora(&self) -> Result<(), Error> {
        let Some(adalora) = &self.adalora else { return Ok(()) };
        let plain = [
            ("use_dora", !self.use_dora),
            ("use_rslora", !self.use_rslora),
            ("rank_pattern", self.rank_pattern.is_empty()),
            ("alpha_pattern", self.alpha_pattern.is_empty()),
            ("init_lora_weights", self.init_lora_weights == InitLoraWeights::True),
        ];
        if let Some((field, _)) = plain.iter().find(|(_, plain)| !plain) {
            return Err(Error::config(format!("`{field}`: expected PEFT's default with AdaLoRA, found another value")));
        }
        adalora.check(self.r)
    }
}
