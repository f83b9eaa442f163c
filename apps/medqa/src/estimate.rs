//! The verb `estimate`: the memory that a run would need, for every ZeRO stage and offload setting.

use crate::{
    args::parse_positive,
    fetch,
    footprint::{count_lora_params, gib, model_shape},
    recipe::{MethodKind, PipelineOptions},
    train::{self, MeanRow},
};
use anyhow::Result;
use burn_llama::LlamaConfig;
use burn_peft::{LoraConfig, TargetModules};
use burn_zero::{
    OffloadDevice, ZeroStage,
    estimate::{
        BaseModel, Cluster, CpuOffload, DeepSpeedEstimate, LlamaShape, MemoryEstimate, MicroBatch, RankStages,
        RunFootprint, StatePlacement, TrainedWeights, TrainingPrecision, WeightStorage, zero2, zero3,
    },
    pipeline::PipelineKind,
    segment::Checkpointing,
};
use clap::Args;
use std::{
    num::NonZeroU64,
    path::{Path, PathBuf},
};

mod measure;

/// Tokens of the longest row of a measured run.
pub(crate) const MAX_ROW_TOKENS: u64 = 512;

/// Arguments of `estimate`.
#[derive(Args)]
pub(crate) struct EstimateArgs {
    /// Model as for `chat`
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// Read the model's dimensions from this config.json instead
    #[arg(long, conflicts_with = "model")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Tokens in a micro-batch, summed over its rows
    #[arg(long, default_value_t = 2048)]
    pub tokens: u64,
    /// Use full activation checkpointing, as with activation_checkpointing = "full" in a recipe
    #[arg(long)]
    pub recompute: bool,
    /// Gradient norm to clip to, as in a recipe; with 0, gradients are not clipped, and those of the whole model never
    /// exist at the same time
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    #[command(flatten)]
    pub measure: MeasureArgs,
}

/// The ranks of the run.
#[derive(Args)]
pub(crate) struct RankArgs {
    /// Number of ranks that share the run
    #[arg(long, default_value = "1", value_parser = parse_positive::<NonZeroU64>)]
    pub world: NonZeroU64,
    /// Data-parallel ranks and pipeline ranks, as parallel.data and parallel.pipeline in a recipe: 2,4 is two pipelines
    /// of four ranks. The table is that of the heaviest rank
    #[arg(long, value_name = "D,P", conflicts_with = "world", value_parser = parse_mesh)]
    pub mesh: Option<Mesh>,
    /// Pipeline schedule, as parallel.schedule in a recipe
    #[arg(long, default_value = "1F1B", requires = "mesh")]
    pub schedule: PipelineKind,
    /// Stages per rank, as parallel.chunks in a recipe
    #[arg(long, requires = "mesh")]
    pub chunks: Option<usize>,
    /// Micro-batches per step, as train.gradient_accumulation in a recipe [default: twice the pipeline ranks]
    #[arg(long, requires = "mesh")]
    pub gradient_accumulation: Option<usize>,
}

/// The two numbers of `--mesh`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mesh {
    data: usize,
    pipeline: usize,
}

fn parse_mesh(text: &str) -> Result<Mesh, String> {
    let number = |text: &str| text.trim().parse().ok().filter(|&number: &usize| number > 0);
    let parsed = text.split_once(',').and_then(|(data, pipeline)| number(data).zip(number(pipeline)));
    let (data, pipeline) = parsed.ok_or("expected two positive integers, such as 2,4")?;
    Ok(Mesh { data, pipeline })
}

impl RankArgs {
    /// Returns the ranks of a run without a pipeline.
    fn alone() -> Self {
        let schedule = PipelineKind::OneFOneB;
        Self { world: NonZeroU64::MIN, mesh: None, schedule, chunks: None, gradient_accumulation: None }
    }

    /// Returns the number of ranks, or of pipelines, that share the model states.
    fn replicas(&self) -> u64 {
        self.mesh.map_or(self.world.get(), |mesh| mesh.data as u64)
    }

    /// Returns the keys of a recipe for the pipeline.
    fn pipeline_options(&self) -> PipelineOptions {
        let Mesh { data, pipeline } = self.mesh.unwrap_or(Mesh { data: 1, pipeline: 1 });
        let data = self.mesh.map(|_| data);
        PipelineOptions { pipeline, data, schedule: self.schedule, chunks: self.chunks, ..PipelineOptions::default() }
    }

    /// Returns the number of micro-batches of a step.
    fn micro_batches(&self) -> usize {
        self.gradient_accumulation.unwrap_or_else(|| self.mesh.map_or(1, |mesh| 2 * mesh.pipeline))
    }
}

/// The trained parameters.
#[derive(Args)]
pub(crate) struct MethodArgs {
    /// Fine-tuning method: full or lora
    #[arg(long, default_value = "lora", value_parser = parse_method)]
    pub method: MethodKind,
    /// LoRA rank (for lora)
    #[arg(long, default_value_t = 8)]
    pub r: u64,
    /// Linear layers that get a LoRA adapter: names separated by commas, or all-linear
    #[arg(long, default_value = "all-linear", value_delimiter = ',', value_name = "NAMES")]
    pub target_modules: Vec<String>,
}

/// The measured run.
#[derive(Args)]
pub(crate) struct MeasureArgs {
    /// Train two steps on meaningless tokens, in f32, and print the estimate next to the counted and the measured
    /// memory; under mpirun, every rank does so
    #[arg(long, conflicts_with = "config")]
    pub measure: bool,
    /// ZeRO stage of --measure: 0 to 3
    #[arg(long, default_value_t = 0, requires = "measure")]
    pub zero_stage: u8,
    /// Offload of the optimizer states in --measure: none, cpu (host memory) or nvme (files in the temporary directory)
    #[arg(long, default_value = "none", requires = "measure")]
    pub offload_optimizer: String,
}

/// Parses the method of a run that is estimated or measured: `full` or `lora`.
pub(crate) fn parse_method(name: &str) -> Result<MethodKind, String> {
    match name {
        "full" => Ok(MethodKind::Full),
        "lora" => Ok(MethodKind::Lora),
        other => Err(format!("expected full or lora, found {other:?}")),
    }
}

/// Runs the verb `estimate`: prints a table on stdout. Only the model's configuration is read, no weights.
pub(crate) fn estimate(args: &EstimateArgs) -> Result<()> {
    if args.measure.measure {
        return measure::measure(args);
    }
    let config = match &args.config {
        Some(path) => LlamaConfig::load(path)?,
        None => fetch::open_checkpoint(&args.model)?.config().clone(),
    };
    let shape = model_shape(&config);
    let all = shape.parameters(config.tie_word_embeddings);
    let trained = match args.method.method {
        MethodKind::Full => all,
        _ => count_lora_params(&shape, &lora_config(&args.method))?,
    };
    let ranks = match args.ranks.mesh {
        Some(Mesh { data, pipeline }) => format!("{data} pipelines of {pipeline} ranks"),
        None if args.ranks.world.get() == 1 => "1 rank".to_owned(),
        None => format!("{} ranks", args.ranks.world),
    };
    println!(
        "{:.1} M parameters, {:.1} M trainable; {ranks}, {} tokens per micro-batch; GiB per rank, device + host",
        all as f64 / 1e6,
        trained as f64 / 1e6,
        args.tokens
    );
    let stages = pipeline_stages(args, &config)?;
    EstimatedRun { args, shape, all, trained, stages }.print_table();
    if trained == all && args.ranks.mesh.is_none() {
        print_deepspeed_estimates(all, shape.vocabulary * shape.hidden, args.ranks.world.get());
    }
    Ok(())
}

/// Returns the stages of every rank of a pipeline and prints them; one rank with the whole model without `--mesh`.
fn pipeline_stages(args: &EstimateArgs, config: &LlamaConfig) -> Result<Vec<RankStages>> {
    if args.ranks.mesh.is_none() {
        return Ok(vec![RankStages::whole(model_shape(config).segments())]);
    }
    let options = args.ranks.pipeline_options();
    let row = args.tokens.min(MAX_ROW_TOKENS);
    let segments = train::stage_segments(&options, config, MeanRow { tokens: row, targets: row })?;
    let ranks = train::rank_stages(&options, &segments, args.ranks.micro_batches())?;
    println!("\nrank  segments            live activations, kept for gradients of weights");
    for (number, rank) in ranks.iter().enumerate() {
        let segments = rank.segments.iter().map(|range| format!("{}-{}", range.start, range.end - 1));
        println!("{number:<6}{:<20}{}, {}", segments.collect::<Vec<_>>().join(" "), rank.live, rank.kept);
    }
    Ok(ranks)
}

/// Runs two steps of LoRA or full fine-tuning of `model` on rows of meaningless tokens, and writes their trace to
/// `path`.
///
/// # Errors
/// If the model cannot be loaded or the trace cannot be written.
pub(crate) fn trace_two_steps(model: &str, method: MethodKind, tokens: u64, path: &Path) -> Result<()> {
    let target_modules = vec!["all-linear".to_owned()];
    let args = EstimateArgs {
        model: model.to_owned(),
        config: None,
        method: MethodArgs { method, r: 8, target_modules },
        ranks: RankArgs::alone(),
        tokens,
        recompute: false,
        max_grad_norm: 1.0,
        measure: MeasureArgs { measure: true, zero_stage: 0, offload_optimizer: "none".to_owned() },
    };
    measure::trace_two_steps(&args, path)
}

/// The run whose memory is estimated.
struct EstimatedRun<'a> {
    args: &'a EstimateArgs,
    shape: LlamaShape,
    /// Parameters of the base model.
    all: u64,
    /// Trainable parameters.
    trained: u64,
    /// The stages of every rank of a pipeline.
    stages: Vec<RankStages>,
}

impl EstimatedRun<'_> {
    /// Prints the memory of one rank with every ZeRO stage, place of the optimizer and precision.
    fn print_table(&self) {
        println!("\n{:<10}{:<20}{:>24}{:>28}", "stage", "optimizer", "f32", "bf16, f32 master weights");
        for stage in [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights] {
            for setting in OFFLOAD_SETTINGS {
                let in_pipeline = stage == ZeroStage::Weights && self.stages.len() > 1;
                if in_pipeline || setting.weights != OffloadDevice::None && stage != ZeroStage::Weights {
                    continue;
                }
                let place = setting.name;
                let cell = |precision| {
                    let footprint = self.footprint(stage, setting, precision);
                    let ranks = self.stages.iter().map(|stages| footprint.peak_memory_of_stages(stages));
                    let heaviest = ranks.max_by_key(MemoryEstimate::total).unwrap_or_default();
                    format!("{:.2} + {:.2}", gib(heaviest.device()), gib(heaviest.host))
                };
                let (single, mixed) = (cell(TrainingPrecision::F32), cell(TrainingPrecision::Mixed));
                println!("{:<10}{place:<20}{single:>24}{mixed:>28}", u8::from(stage));
            }
        }
    }

    /// Returns the footprint of one rank.
    fn footprint(&self, stage: ZeroStage, setting: OffloadSetting, precision: TrainingPrecision) -> RunFootprint {
        let Self { args, shape, all, trained, .. } = *self;
        let storage = match precision {
            TrainingPrecision::F32 => WeightStorage::F32,
            TrainingPrecision::Mixed => WeightStorage::Half,
        };
        RunFootprint {
            base: BaseModel { shape, weights: all, storage },
            trained_weights: if trained == all { TrainedWeights::All } else { TrainedWeights::Adapters },
            trained,
            precision,
            placement: StatePlacement {
                stage,
                world_size: args.ranks.replicas(),
                offload_optimizer: setting.optimizer,
                offload_param: setting.weights,
                optimizer_in_backward: args.max_grad_norm == 0.0 && self.stages.len() == 1,
            },
            bucket_size: 4 << 20,
            micro_batch: MicroBatch {
                tokens: args.tokens,
                value_bytes: precision.bytes_per_weight(),
                checkpointing: if args.recompute { Checkpointing::Full } else { Checkpointing::None },
                first_layer: 0,
            },
        }
    }
}

/// Returns the LoRA configuration that the arguments describe.
fn lora_config(args: &MethodArgs) -> LoraConfig {
    let names = args.target_modules.clone();
    let target_modules = match names.as_slice() {
        [all] if all == "all-linear" => TargetModules::Pattern(all.clone()),
        _ => TargetModules::Suffixes(names),
    };
    LoraConfig { r: args.r as usize, target_modules, ..LoraConfig::default() }
}

/// The places of the model states in one row of the table.
#[derive(Clone, Copy)]
struct OffloadSetting {
    name: &'static str,
    /// The place of the optimizer states.
    optimizer: OffloadDevice,
    /// The place of this rank's parameter shard.
    weights: OffloadDevice,
}

const HOST_WITH_WEIGHTS: &str = "host, weights too";

const OFFLOAD_SETTINGS: [OffloadSetting; 4] = [
    OffloadSetting { name: "device", optimizer: OffloadDevice::None, weights: OffloadDevice::None },
    OffloadSetting { name: "host", optimizer: OffloadDevice::Cpu, weights: OffloadDevice::None },
    OffloadSetting { name: "file", optimizer: OffloadDevice::Nvme, weights: OffloadDevice::None },
    OffloadSetting { name: HOST_WITH_WEIGHTS, optimizer: OffloadDevice::Cpu, weights: OffloadDevice::Cpu },
];

/// Prints what DeepSpeed's own memory estimators give for full fine-tuning on one node.
fn print_deepspeed_estimates(all: u64, largest_layer: u64, devices: u64) {
    let nodes = Cluster { nodes: 1, devices_per_node: devices };
    println!(
        "\nDeepSpeed's formulas (16-bit weights, f32 master weights, its buffers, no activations; stage 3 with zero.Init)"
    );
    let row = |stage: u8, place: &str, DeepSpeedEstimate { device, host }: DeepSpeedEstimate| {
        println!("{stage:<10}{place:<20}{:>52}", format!("{:.2} + {:.2}", gib(device), gib(host / devices)));
    };
    row(2, "device", zero2(all, nodes, false));
    row(2, "host", zero2(all, nodes, true));
    for (place, offload) in
        [("device", CpuOffload::None), ("host", CpuOffload::Optimizer), (HOST_WITH_WEIGHTS, CpuOffload::All)]
    {
        row(3, place, zero3(all, largest_layer, nodes, offload, true));
    }
}
