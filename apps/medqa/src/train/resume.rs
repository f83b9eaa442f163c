//! The start of a run, at its first step or at the newest checkpoint.

use super::{
    RankPipeline,
    adalora::RankAllocation,
    inputs::{self, RunInputs},
    model_loader::{LlamaEngine, ModelLoader},
    options::TrainOptions,
    setup,
    state::{self, STATE_FILE, TrainerState},
};
use crate::recipe::Recipe;
use anyhow::{Context, Result, bail};
use burn::backend::Autodiff;
use burn_llama::{Llama, Tokenizer, kernel::Kernels};
use burn_peft::adapter::QuantizationResidual;
use burn_zero::EngineConfig;
use std::path::Path;

/// The recipe, the options and the inputs of a run that is about to start.
pub(super) struct Start<'a, B: Kernels> {
    pub recipe: &'a Recipe,
    pub loader: &'a ModelLoader<B>,
    pub tokenizer: &'a Tokenizer,
    pub pipeline: Option<&'a RankPipeline>,
    pub options: &'a TrainOptions,
    /// The inputs of the run, as they are now.
    pub inputs: RunInputs,
    /// Rows per step, of all ranks.
    pub rows_per_step: usize,
    /// The steps of the whole run.
    pub total_steps: usize,
}

/// A run at its first step or at a checkpoint.
pub(super) struct Started<B: Kernels> {
    pub engine: LlamaEngine<B>,
    /// The ranks allocated so far, with AdaLoRA.
    pub allocation: Option<RankAllocation<B>>,
    pub state: TrainerState,
    /// A note for `metrics.jsonl`, if the run goes on with other data.
    pub note: Option<String>,
}

impl<B: Kernels> Started<B> {
    /// Returns an error on every rank if the ranks have read different rows, or have different tokenizers.
    fn check_same_on_all_ranks(&self) -> Result<()> {
        let Some(inputs) = &self.state.inputs else { return Ok(()) };
        let own = inputs.fingerprint()?;
        let different = self.engine.sum_over_ranks(&[own])?[0] != own * self.engine.world() as f64;
        if self.engine.sum_over_ranks(&[f64::from(different)])?[0] > 0.0 {
            bail!("the ranks have different rows or tokenizers; expected the same files on every machine");
        }
        Ok(())
    }
}

impl<B: Kernels> Start<'_, B> {
    /// Creates the engine for the model, and brings it to the newest checkpoint in the run directory. Without one,
    /// initializes the adapters by LoftQ, if the recipe asks for it.
    ///
    /// # Errors
    /// If the checkpoint cannot be read, is of a run with other rows, or the ranks have different rows.
    pub(super) fn engine(self, model: Llama<Autodiff<B>>, config: EngineConfig) -> Result<Started<B>> {
        let started = self.first_step_or_checkpoint(model, config)?;
        started.check_same_on_all_ranks()?;
        Ok(started)
    }

    fn first_step_or_checkpoint(self, mut model: Llama<Autodiff<B>>, config: EngineConfig) -> Result<Started<B>> {
        let Some(checkpoint) = state::checkpoints(&self.options.directory)?.pop() else {
            let loftq = setup::init_loftq(&mut model, self.recipe)?;
            let engine = self.loader.engine(model, self.tokenizer, config, self.pipeline)?;
            report_loftq(loftq.filter(|_| engine.rank() == 0));
            let state = TrainerState { inputs: Some(self.inputs), ..TrainerState::default() };
            let allocation = RankAllocation::new(&engine, self.recipe);
            return Ok(Started { engine, allocation, state, note: None });
        };
        let (state, note) = self.compare(&checkpoint)?;
        let mut engine = self.loader.engine(model, self.tokenizer, config, self.pipeline)?;
        engine.restore(&checkpoint.join(STATE_FILE)).with_context(|| state::advice(&checkpoint))?;
        let mut allocation = RankAllocation::new(&engine, self.recipe);
        allocation.iter_mut().try_for_each(|allocation| allocation.restore(&mut engine, &checkpoint))?;
        if engine.rank() == 0 {
            eprintln!("resuming after step {} ({})", state.step, checkpoint.display());
            note.iter().for_each(|note| eprintln!("note: {note}"));
        }
        let known = state.inputs.is_some();
        let state = TrainerState { inputs: Some(self.inputs), ..state };
        Ok(Started { engine, allocation, state, note: note.filter(|_| known) })
    }

    /// Reads the state in a checkpoint and compares its rows with those of now; also returns a note for the user.
    fn compare(&self, checkpoint: &Path) -> Result<(TrainerState, Option<String>)> {
        let (state, at) = (state::read_state(checkpoint)?, checkpoint.display());
        if state.rows_per_step != self.rows_per_step {
            bail!(
                "{at}: `train.batch_size` · `train.gradient_accumulation` · ranks: the run has {} rows per step, now {}; \
                 a resumed run keeps them",
                state.rows_per_step,
                self.rows_per_step
            );
        }
        let complete = state::steps_of_complete_run(&self.options.directory)?;
        if state.step > self.total_steps || complete.is_some_and(|steps| steps >= self.total_steps) {
            bail!(
                "{at}: the run has taken {} steps, the recipe asks for {}; raise `train.max_steps` or `train.epochs`",
                complete.unwrap_or(state.step),
                self.total_steps
            );
        }
        let note = match &state.inputs {
            Some(before) => inputs::compare(before, &self.inputs, self.options.allow_changed_data)
                .with_context(|| at.to_string())?,
            None => Some(format!("{at} is of an earlier version and has no digest of its data, so none is compared")),
        };
        Ok((state, note))
    }
}

fn report_loftq(residual: Option<QuantizationResidual>) {
    if let Some(QuantizationResidual { layers, without_adapter, with_adapter }) = residual {
        let share = 100.0 * (1.0 - with_adapter / without_adapter);
        eprintln!("loftq: the adapters of {layers} layers remove {share:.1} % of the squared error of nf4");
    }
}
