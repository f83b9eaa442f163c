//! A pipeline trains what one process trains: losses and gradients are equal bit for bit, and the messages are those of
//! the formula.

mod loading;
mod tied;
mod torch;

use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::Tensor,
};
use burn_llama::{Batch, Example, Llama, LlamaConfig, SequenceLayout};
use burn_peft::{DropoutKey, ForwardContext, LoraConfig, PromptConfig, TargetModules, adapter, param};
use burn_zero::{
    Engine, EngineConfig, MemoryTier, PipelineConfig, Sharding, TrainStepOutput, ZeroStage,
    comm::threads,
    optimizer::AdamW,
    pipeline::{PartitionMethod, PipelineKind, PipelineSchedule, PipelineShape, TraceFile},
    segment::{Checkpointing, Segments},
};
use laws::{floats, max_abs, max_diff, one_backward_at_a_time};
use std::collections::{BTreeMap, HashSet};

type Train = Autodiff<Flex>;
type PipelineEngine = Engine<Train, Llama<Train>>;
/// Values by path.
type Values = BTreeMap<String, Vec<f32>>;

const LAYERS: usize = 3;
const HIDDEN: usize = 16;
const MICRO_BATCHES: usize = 4;
const VIRTUAL_TOKENS: usize = 3;

/// A model and the part of it that learns.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Case {
    Tied,
    Untied,
    FrozenStart,
    Lora,
    Prefix,
}

const CASES: [Case; 5] = [Case::Tied, Case::Untied, Case::FrozenStart, Case::Lora, Case::Prefix];

fn base(case: Case) -> Llama<Train> {
    let fields = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": 24,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": if case == Case::Tied { 4 } else { 2 },
        "tie_word_embeddings": case == Case::Tied, "initializer_range": 0.2,
    });
    LlamaConfig::from_json(fields).unwrap().init(3, &Default::default())
}

/// Applies the method of a case to its model, or to a part of it.
fn learning(case: Case, mut model: Llama<Train>) -> Llama<Train> {
    match case {
        Case::Tied | Case::Untied => model,
        Case::FrozenStart => {
            param::train_only(model, |path| path.contains("layers.1.mlp") || path.contains("layers.2"))
        }
        Case::Lora => {
            let target_modules = TargetModules::Pattern("all-linear".into());
            let lora = LoraConfig { r: 2, lora_dropout: 0.1, target_modules, ..LoraConfig::default() };
            adapter::attach(&mut model, "default", &lora, 5).unwrap();
            // B starts at zero, which would make the gradient of A zero as well.
            burn_peft::Linears::linears_mut(&mut model, &mut |_, linear| {
                for adapter in &mut linear.adapters {
                    adapter.lora_b = adapter.lora_b.clone().map(|b| (b.detach() + 0.03).detach().require_grad());
                }
            });
            param::train_only(model, adapter::is_adapter)
        }
        Case::Prefix => {
            model.prompts = vec![model.new_prompt(&PromptConfig::prefix(VIRTUAL_TOKENS), None, 7).unwrap()];
            param::train_only(model, adapter::is_adapter)
        }
    }
}

fn model(case: Case) -> Llama<Train> {
    learning(case, base(case))
}

/// The number of tokens of a micro-batch; no two are equal.
fn tokens(micro_batch: usize) -> usize {
    5 + 3 * micro_batch
}

fn micro_batch(model: &Llama<Train>, index: usize) -> Batch<Train> {
    let row = |n: usize| Example {
        ids: (0..n).map(|i| ((i * 13 + index * 7) % 40) as u32).collect(),
        loss_mask: (0..n).map(|i| i > index % 2).collect(),
    };
    // Two rows of unequal length, without padding.
    let rows = [row(3), row(tokens(index) - 3)];
    let layout = SequenceLayout::from_lengths(&[3, tokens(index) - 3], true);
    let key = DropoutKey { seed: 1, step: 0, tokens: layout.dropout_tokens(2 * index as u64) };
    model.batch(&rows, &layout, 0.05, ForwardContext::training(key)).unwrap()
}

fn micro_batches(model: &Llama<Train>, indices: impl Iterator<Item = usize>) -> Vec<Batch<Train>> {
    indices.map(|index| micro_batch(model, index)).collect()
}

/// The outcome of one step.
struct Outcome {
    losses: f64,
    forward_losses: f64,
    gradients: Values,
    grad_norm: f64,
    /// The parameters after the step; on a rank of a pipeline only its own.
    parameters: Values,
}

#[derive(Default)]
struct ReadParameters {
    path: Vec<String>,
    seen: HashSet<ParamId>,
    values: Values,
}

impl ModuleVisitor<Train> for ReadParameters {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let value = floats(&param.val().into_data());
        if value.len() > 1 && self.seen.insert(param.id) {
            self.values.insert(self.path.join("."), value);
        }
    }
}

fn step(engine: &mut PipelineEngine, batches: &[Batch<Train>]) -> Outcome {
    let forward_losses = engine.losses(batches).unwrap();
    let losses = engine.forward_backward(batches).unwrap();
    let gradients = engine.gradients().into_iter();
    let gradients = gradients.map(|found| (found.path, floats(&found.value.flatten().into_data()))).collect();
    let grad_norm = engine.step(1e-2).unwrap().grad_norm;
    let mut read = ReadParameters::default();
    engine.model().visit(&mut read);
    Outcome { losses, forward_losses, gradients, grad_norm, parameters: read.values }
}

fn config(checkpointing: Checkpointing) -> EngineConfig {
    EngineConfig::new(AdamW::default()).with_max_grad_norm(0.5).with_checkpointing(checkpointing)
}

/// The kinds, with chunks and the smallest number of ranks with which they are something of their own.
const KINDS: [(PipelineKind, usize); 6] = [
    (PipelineKind::GPipe, 1),
    (PipelineKind::OneFOneB, 1),
    (PipelineKind::ZBH1, 1),
    (PipelineKind::Interleaved1F1B, 2),
    (PipelineKind::LoopedBFS, 2),
    (PipelineKind::ZBV, 2),
];

fn pipeline(ranks: usize, kind: PipelineKind, chunks: usize) -> PipelineConfig {
    let weights = [1; 2 * LAYERS + 2];
    let segments = PartitionMethod::Uniform.split(&weights, ranks * chunks).unwrap();
    PipelineConfig { ranks, kind, chunks, segments }
}

fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let apart = found.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!(apart, 0, "{what}: {apart} of {} values differ, by up to {:e}", found.len(), max_diff(found, expected));
}

/// Compares the outcome of all ranks with that of one process. The table of a tied model has two uses, which one process
/// sums per micro-batch and a pipeline of several ranks per step.
fn assert_equal(found: &[Outcome], one: &Outcome, tied: Option<&str>, what: &str) {
    let sum = |of: fn(&Outcome) -> f64| found.iter().map(of).sum::<f64>();
    assert_eq!((sum(|f| f.losses), sum(|f| f.forward_losses)), (one.losses, one.losses), "{what}: losses");
    let mut gradients = Values::new();
    for (path, part) in found.iter().flat_map(|outcome| &outcome.gradients) {
        let sum = gradients.entry(path.clone()).or_insert_with(|| vec![0.0; part.len()]);
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    assert_eq!(gradients.keys().collect::<Vec<_>>(), one.gradients.keys().collect::<Vec<_>>(), "{what}");
    for (path, expected) in &one.gradients {
        assert!(max_abs(expected) > 0.0, "{path}: a gradient of zero proves nothing");
        if tied == Some(path) {
            assert!(max_diff(&gradients[path], expected) <= 1e-6 * max_abs(expected), "{what}: {path}");
        } else {
            assert_bits(&gradients[path], expected, &format!("{what}: gradient of {path}"));
        }
    }
    for outcome in found {
        let apart = (outcome.grad_norm - one.grad_norm).abs();
        assert!(if tied.is_some() { apart <= 1e-6 * one.grad_norm } else { apart == 0.0 }, "{what}: the norm");
        for (path, value) in &outcome.parameters {
            if tied.is_some() {
                assert!(max_diff(value, &one.parameters[path]) <= 2e-5, "{what}: {path} after the step");
            } else {
                assert_bits(value, &one.parameters[path], &format!("{what}: {path} after the step"));
            }
        }
    }
    let kept: HashSet<_> = found.iter().flat_map(|outcome| outcome.parameters.keys()).collect();
    assert_eq!(kept.len(), one.parameters.len(), "{what}: every parameter is on a rank");
}

fn one_process(case: Case, checkpointing: Checkpointing) -> Outcome {
    let mut engine = config(checkpointing).init(model(case)).unwrap();
    let batches = micro_batches(engine.model(), 0..MICRO_BATCHES);
    step(&mut engine, &batches)
}

#[test]
fn a_pipeline_of_any_kind_is_one_process_bit_for_bit() {
    let _lock = one_backward_at_a_time();
    for case in CASES {
        let one = one_process(case, Checkpointing::None);
        for (kind, chunks) in KINDS {
            for ranks in 1..=4 {
                if kind == PipelineKind::Interleaved1F1B && !MICRO_BATCHES.is_multiple_of(ranks) {
                    continue;
                }
                let checkpointing = if ranks == 2 { Checkpointing::Full } else { Checkpointing::None };
                let found = threads::run(ranks, |group| {
                    let model = model(case);
                    let batches = micro_batches(&model, 0..MICRO_BATCHES);
                    let config = config(checkpointing).with_communicator(Box::new(group));
                    let mut engine = config.with_pipeline(pipeline(ranks, kind, chunks)).init(model).unwrap();
                    step(&mut engine, &batches)
                });
                let tied = (case == Case::Tied && ranks * chunks > 1).then_some("model.embed_tokens.weight");
                assert_equal(&found, &one, tied, &format!("{case:?}, {kind}, {ranks} ranks"));
            }
        }
    }
}

/// Every hop sends the hidden states of every token forward (those of the targets inside the last layer), and their gradients back unless nothing before it learns;
/// with a prefix also keys and values of the later layers.
#[test]
fn messages_of_a_pipeline_are_those_of_the_formula() {
    let _lock = one_backward_at_a_time();
    let hidden = |rows: fn(usize) -> usize| (0..MICRO_BATCHES).map(|index| (HIDDEN * rows(index)) as u64).sum::<u64>();
    // Behind the attention of the last layer only the tokens that predict a target go on.
    let targets = |index| tokens(index) - 2 * (1 + index % 2);
    for case in CASES {
        let ranks = 4;
        let sent: Vec<u64> = threads::run(ranks, |group| {
            let model = model(case);
            let batches = micro_batches(&model, 0..MICRO_BATCHES);
            let config = config(Checkpointing::None).with_communicator(Box::new(group));
            let mut engine = config.with_pipeline(pipeline(ranks, PipelineKind::OneFOneB, 1)).init(model).unwrap();
            engine.forward_backward(&batches).unwrap();
            engine.traffic_by_axis().pipeline.sent.elements
        });
        let stages = pipeline(ranks, PipelineKind::OneFOneB, 1).segments;
        // The first segment that learns: the MLP of layer 1 is segment 4.
        let first = if case == Case::FrozenStart { 4 } else { usize::from(case == Case::Lora) };
        // Key and value heads of both rows: 2 heads of 4 values, for keys and values.
        let prefix = |boundary: usize| match case {
            Case::Prefix => (MICRO_BATCHES * VIRTUAL_TOKENS * 2 * 2 * 4 * (LAYERS - (boundary / 2).min(LAYERS))) as u64,
            _ => 0,
        };
        let hop = |boundary| if boundary < 2 * LAYERS { hidden(tokens) } else { hidden(targets) } + prefix(boundary);
        for (rank, sent) in sent.into_iter().enumerate() {
            let forward = if rank + 1 < ranks { hop(stages[rank].end) } else { 0 };
            let back = if rank > 0 && first < stages[rank].start { hop(stages[rank].start) } else { 0 };
            assert_eq!(sent, forward + back, "{case:?}, rank {rank}");
        }
    }
}

/// Data parallelism beside a pipeline, in every ZeRO stage that it takes. Each replica takes its own micro-batches.
#[test]
fn data_and_pipeline_are_one_process_in_every_zero_stage() {
    let _lock = one_backward_at_a_time();
    for case in CASES {
        let one = one_process(case, Checkpointing::None);
        for stage in [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients] {
            for (kind, chunks) in KINDS {
                let outcomes = threads::run(4, |group| {
                    let model = model(case);
                    let config = config(Checkpointing::None).with_communicator(Box::new(group));
                    let sharding = Sharding { stage, bucket_size: 600 };
                    // Half of the kinds keep their optimizer states in host memory.
                    let tier = if chunks == 1 { MemoryTier::Host } else { MemoryTier::Device };
                    let config = config.with_sharding(sharding).with_optimizer_states_in(tier);
                    let config = config.with_pipeline(pipeline(2, kind, chunks));
                    let mut engine = config.init(model).unwrap();
                    let own = (0..MICRO_BATCHES / 2).map(|index| 2 * index + engine.replica());
                    let batches = micro_batches(engine.model(), own);
                    let TrainStepOutput { loss, report } = engine.train_step(&batches, 1e-2).unwrap();
                    let loss = engine.sum_over_ranks(&[loss]).unwrap()[0];
                    let mut read = ReadParameters::default();
                    engine.model().visit(&mut read);
                    (loss, report.grad_norm, read.values)
                });
                for (loss, norm, parameters) in outcomes {
                    let what = format!("{case:?}, {stage:?}, {kind}");
                    assert!((loss - one.losses).abs() <= 1e-12 * one.losses, "{what}: {loss}");
                    assert!((norm - one.grad_norm).abs() <= 1e-6 * one.grad_norm, "{what}: {norm}");
                    for (path, value) in &parameters {
                        assert!(max_diff(value, &one.parameters[path]) <= 2e-5, "{what}: {path} after the step");
                    }
                }
            }
        }
    }
}

/// The trace has every pass in the order of the schedule. What a rank keeps for weight gradients that it has put off is
/// counted; adapters put nothing off.
#[test]
fn passes_are_traced_and_deferred_products_are_counted() {
    let _lock = one_backward_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    for (case, kind, chunks, defers) in [
        (Case::Untied, PipelineKind::OneFOneB, 1, false),
        (Case::Untied, PipelineKind::ZBH1, 1, true),
        (Case::Untied, PipelineKind::ZBV, 2, true),
        (Case::Lora, PipelineKind::ZBH1, 1, false),
    ] {
        let peaks = threads::run(2, |group| {
            let config = config(Checkpointing::None).with_communicator(Box::new(group));
            let mut engine = config.with_pipeline(pipeline(2, kind, chunks)).init(model(case)).unwrap();
            let batches = micro_batches(engine.model(), 0..MICRO_BATCHES);
            engine.train_step(&batches, 1e-2).unwrap();
            engine.write_trace(&path).unwrap();
            engine.peak_memory().deferred
        });
        assert!(peaks.iter().all(|&peak| (peak > 0) == defers), "{case:?}, {kind}: {peaks:?}");
        let shape = PipelineShape::new(2, chunks, MICRO_BATCHES).unwrap().with_placement(kind.placement());
        let schedule = PipelineSchedule::new(kind, shape).unwrap();
        let trace = TraceFile::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(trace.timeline(&schedule).unwrap().ranks.len(), 2, "{case:?}, {kind}");
    }
    // One rank runs W right after I, so it keeps the factors of one micro-batch and all layers: `x` and `dy` of seven
    // projections. Those of the output projection and the MLP of the last layer have a row per target.
    let mut engine = config(Checkpointing::None)
        .with_pipeline(pipeline(1, PipelineKind::ZBH1, 1))
        .init(model(Case::Untied))
        .unwrap();
    let batches = micro_batches(engine.model(), 0..MICRO_BATCHES);
    engine.train_step(&batches, 1e-2).unwrap();
    let elements = engine.peak_memory().deferred / 4;
    let (rows, kv, mlp) = (tokens(MICRO_BATCHES - 1), 8, 24);
    let layer = HIDDEN + HIDDEN + 2 * kv + 2 * HIDDEN + HIDDEN + 2 * mlp + mlp + HIDDEN;
    let most = rows * LAYERS * layer;
    assert!(elements <= most && elements >= rows * (LAYERS - 1) * layer, "{elements} of at most {most}");
}

#[test]
fn a_pipeline_that_cannot_be_is_refused() {
    let _lock = one_backward_at_a_time();
    let refused = |ranks, stage, pipeline: PipelineConfig| {
        let errors = threads::run(ranks, |group| {
            let config = config(Checkpointing::None).with_communicator(Box::new(group)).with_pipeline(pipeline.clone());
            config.with_sharding(Sharding { stage, ..Sharding::default() }).init(model(Case::Untied)).err().unwrap()
        });
        errors[0].to_string()
    };
    let segments = model(Case::Untied).segments();
    let two = || pipeline(2, PipelineKind::OneFOneB, 1);
    let third = refused(2, ZeroStage::Weights, two());
    assert!(third.contains("at most 2 with a pipeline") && third.contains("hold the weights"), "{third}");
    let odd = refused(3, ZeroStage::Disabled, two());
    assert!(odd.contains("a divisor of the 3 ranks"), "{odd}");
    let short = PipelineConfig { segments: vec![0..2, 2..segments - 1], ..two() };
    let short = refused(2, ZeroStage::Disabled, short);
    assert!(short.contains(&format!("2 consecutive ranges of the {segments} segments")), "{short}");
}
