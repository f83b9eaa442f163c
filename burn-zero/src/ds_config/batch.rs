//! The three batch-size settings, of which two determine the third.

use crate::ConfigError;

/// The batch sizes of a step. They fit together: `train = micro · accumulation · world_size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSizes {
    /// `train_batch_size`: the samples per optimizer step, over all ranks.
    pub train: u64,
    /// `train_micro_batch_size_per_gpu`: the samples per forward pass of one rank.
    pub micro: u64,
    /// `gradient_accumulation_steps`: the micro-batches per optimizer step.
    pub accumulation: u64,
}

impl BatchSizes {
    /// Completes the three settings from those that are given, for `world` ranks, by DeepSpeed's rules: two determine
    /// the third, rounded down; `train` alone and `micro` alone mean no gradient accumulation.
    ///
    /// # Errors
    /// [`ConfigError::MissingBatchSize`], [`ConfigError::ZeroBatchSize`] or [`ConfigError::BatchSizeMismatch`], with
    /// DeepSpeed's messages.
    ///
    /// # Panics
    /// If `world` is 0.
    pub(super) fn complete(
        train: Option<u64>,
        micro: Option<u64>,
        accumulation: Option<u64>,
        world: u64,
    ) -> Result<Self, ConfigError> {
        let given = BatchSizes {
            train: positive(train.unwrap_or(1), "Train batch size")?,
            micro: positive(micro.unwrap_or(1), "Micro batch size per gpu")?,
            accumulation: positive(accumulation.unwrap_or(1), "Gradient accumulation steps")?,
        };
        let batch = match (train, micro, accumulation) {
            (Some(_), Some(_), Some(_)) => given,
            (Some(train), Some(micro), None) => Self { accumulation: train / micro / world, ..given },
            (Some(train), None, _) => Self { micro: train / world / given.accumulation, ..given },
            (None, Some(micro), _) => {
                Self { train: micro.saturating_mul(given.accumulation).saturating_mul(world), ..given }
            }
            (None, None, _) => return Err(ConfigError::MissingBatchSize),
        };
        positive(batch.micro, "Micro batch size per gpu")?;
        positive(batch.accumulation, "Gradient accumulation steps")?;
        let Self { train, micro, accumulation } = batch;
        if micro.checked_mul(accumulation).and_then(|part| part.checked_mul(world)) != Some(train) {
            return Err(ConfigError::BatchSizeMismatch { train, micro, accumulation, world });
        }
        Ok(batch)
    }
}

fn positive(number: u64, what: &'static str) -> Result<u64, ConfigError> {
    if number == 0 { Err(ConfigError::ZeroBatchSize { what }) } else { Ok(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_settings_give_the_third() {
        // The table: (train, micro, accumulation, world size, expected).
        let table = [
            (Some(32), Some(4), Some(2), 4, [32, 4, 2]),
            (Some(32), Some(4), None, 4, [32, 4, 2]),
            (Some(32), None, Some(2), 4, [32, 4, 2]),
            (None, Some(4), Some(2), 4, [32, 4, 2]),
            (Some(32), None, None, 4, [32, 8, 1]),
            (None, Some(4), None, 4, [16, 4, 1]),
            (Some(1), None, None, 1, [1, 1, 1]),
        ];
        for (train, micro, accumulation, world, expected) in table {
            let BatchSizes { train, micro, accumulation } =
                BatchSizes::complete(train, micro, accumulation, world).unwrap();
            assert_eq!([train, micro, accumulation], expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_said_in_deepspeeds_words() {
        let missing = "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided";
        let product = "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * \
                       gradient_acc_step * world_size";
        let zero = |what: &str| format!("{what}: 0 has to be greater than 0");
        let table = [
            (None, None, None, 4, missing.to_owned()),
            (None, None, Some(2), 4, missing.to_owned()),
            (Some(32), Some(4), Some(4), 4, format!("{product} 32 != 4 * 4 * 4")),
            // Rounded down: 10 / 4 / 1, 10 / 2 / 4, 10 / 4.
            (Some(10), Some(4), None, 1, format!("{product} 10 != 4 * 2 * 1")),
            (Some(10), None, Some(4), 2, format!("{product} 10 != 1 * 4 * 2")),
            (Some(10), None, None, 4, format!("{product} 10 != 2 * 1 * 4")),
            (Some(4), Some(4), None, 2, zero("Gradient accumulation steps")),
            (Some(2), None, None, 4, zero("Micro batch size per gpu")),
            (Some(4), None, Some(4), 2, zero("Micro batch size per gpu")),
            (Some(0), Some(4), Some(4), 1, zero("Train batch size")),
            (Some(4), Some(0), None, 1, zero("Micro batch size per gpu")),
            (Some(4), None, Some(0), 1, zero("Gradient accumulation steps")),
            (None, Some(0), None, 1, zero("Micro batch size per gpu")),
            (None, Some(4), Some(0), 1, zero("Gradient accumulation steps")),
        ];
        for (train, micro, accumulation, world, expected) in table {
            let found = BatchSizes::complete(train, micro, accumulation, world).unwrap_err().to_string();
            assert_eq!(found, expected, "{train:?} {micro:?} {accumulation:?} {world}");
        }
    }

    #[test]
    fn products_that_overflow_do_not_panic() {
        let error = BatchSizes::complete(None, Some(u64::MAX), Some(2), 2).unwrap_err();
        assert!(matches!(error, ConfigError::BatchSizeMismatch { .. }), "{error}");
    }
}
