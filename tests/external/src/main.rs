//! Shows that a `Llama` is an ordinary Burn module: fine-tunes a small random model with LoRA, using Burn's own
//! `Learner` and `AdamW` and nothing from burn-zero. Prints the loss of every epoch and fails if it does not fall.

use burn::{
    backend::{Autodiff, Flex},
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    module::{AutodiffModule, Module},
    optim::AdamWConfig,
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
    train::{
        InferenceStep, ItemLazy, Learner, LearnerSummary, SupervisedTraining, TrainOutput, TrainStep,
        metric::{Adaptor, LossInput, LossMetric, MetricDefinition},
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
            MetricsRendererTraining, ProgressType, TrainingProgress,
        },
    },
};
use burn_llama::{Example, Llama, LlamaConfig, SequenceLayout, kernel::Kernels};
use burn_peft::{ForwardContext, LoraConfig, TargetModules, adapter};
use std::{error::Error, sync::Arc};

type Train = Autodiff<Flex>;

/// A model with a loss. The wrapper type is needed to implement burn-train's traits.
#[derive(Module, Debug)]
struct FineTune<B: Kernels> {
    llama: Llama<B>,
}

impl<B: Kernels> FineTune<B> {
    /// Returns the mean loss of all targets, `[1]`.
    fn loss(&self, rows: &[Example]) -> Tensor<B, 1> {
        let layout = SequenceLayout::from_lengths(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), true);
        let targets: usize = rows.iter().map(Example::num_targets).sum();
        let batch = self.llama.batch(rows, &layout, 1.0 / targets as f32, ForwardContext::default());
        self.llama.batch_loss(&batch.expect("the rows were made for this vocabulary")).sum()
    }
}

impl<B: AutodiffBackend + Kernels> TrainStep for FineTune<B>
where
    B::InnerBackend: Kernels,
{
    type Input = Vec<Example>;
    type Output = Loss<B::InnerBackend>;

    fn step(&self, rows: Vec<Example>) -> TrainOutput<Self::Output> {
        let loss = self.loss(&rows);
        TrainOutput::new(self, loss.backward(), Loss(loss.inner()))
    }
}

impl<B: Kernels> InferenceStep for FineTune<B> {
    type Input = Vec<Example>;
    type Output = Loss<B>;

    fn step(&self, rows: Vec<Example>) -> Loss<B> {
        Loss(self.loss(&rows))
    }
}

/// The output of a step that metrics see.
struct Loss<B: Backend>(Tensor<B, 1>);

impl<B: Backend> ItemLazy for Loss<B> {
    type ItemSync = Loss<Flex>;

    fn sync(self) -> Loss<Flex> {
        Loss(Tensor::from_data(self.0.into_data(), &Default::default()))
    }
}

impl Adaptor<LossInput<Flex>> for Loss<Flex> {
    fn adapt(&self) -> LossInput<Flex> {
        LossInput::new(self.0.clone())
    }
}

/// A batcher that returns rows unchanged: they stay in host memory until the model builds its batch.
struct IdentityBatcher;

impl<B: Backend> Batcher<B, Example, Vec<Example>> for IdentityBatcher {
    fn batch(&self, rows: Vec<Example>, _: &B::Device) -> Vec<Example> {
        rows
    }
}

/// A renderer that prints nothing; without a terminal, the stock renderer prints every step.
struct SilentRenderer;

impl MetricsRendererTraining for SilentRenderer {
    fn update_train(&mut self, _: MetricState) {}
    fn update_valid(&mut self, _: MetricState) {}
    fn render_train(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
    fn render_valid(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
}

impl MetricsRendererEvaluation for SilentRenderer {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for SilentRenderer {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _: MetricDefinition) {}
}

fn loader<B: Backend>(rows: std::ops::Range<u32>) -> Arc<dyn DataLoader<B, Vec<Example>>> {
    // Sequences that count in steps of 1 to 5, a rule that the base model does not know.
    let row = |row: u32| {
        let ids = (0..24 + row % 7).map(|i| (row * 5 + i * (1 + row % 5)) % 61).collect::<Vec<_>>();
        Example::new(&ids[..4], &ids[4..], 64)
    };
    DataLoaderBuilder::new(IdentityBatcher).batch_size(4).shuffle(1).build(InMemDataset::new(rows.map(row).collect()))
}

fn main() -> Result<(), Box<dyn Error>> {
    let config = LlamaConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    }))?;
    let llama = config.init::<Train>(7, &Default::default());
    let target_modules = TargetModules::Pattern("all-linear".into());
    let lora = LoraConfig { r: 8, lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let model = FineTune { llama: adapter::attach_and_freeze(llama, "default", &lora)? };
    let frozen = model.valid().llama.model.layers[0].mlp.up_proj.weight.val().into_data();

    let directory = tempfile::tempdir()?;
    let optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.01).init();
    let trained = SupervisedTraining::new(directory.path(), loader::<Train>(0..64), loader::<Flex>(64..80))
        .metric_train_numeric(LossMetric::<Flex>::new())
        .metric_valid_numeric(LossMetric::<Flex>::new())
        .num_epochs(8)
        .with_application_logger(None)
        .renderer(SilentRenderer)
        .launch(Learner::new(model, optimizer, 1e-2));

    let layer = &trained.model.llama.model.layers[0].mlp.up_proj;
    assert_eq!(layer.weight.val().into_data(), frozen, "a frozen weight moved");
    let moved: f32 = layer.adapters[0].lora_b.val().abs().sum().into_scalar();
    assert!(moved > 0.0, "the adapter did not move");

    let summary = LearnerSummary::new(directory.path(), &["Loss"])?;
    for (split, metrics) in [("training", &summary.metrics.train), ("validation", &summary.metrics.valid)] {
        let losses: Vec<f64> = metrics[0].entries.iter().map(|entry| entry.value).collect();
        println!("{split} loss by epoch: {losses:.3?}");
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.7 * first, "the {split} loss did not fall: {first:.3} at first, {last:.3} at last");
    }
    Ok(())
}
