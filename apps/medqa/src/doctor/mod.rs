//! The verb `doctor`: checks, on the user's own model and data, that training teaches exactly what `chat` uses.

mod compute;
mod device;
mod pipeline;
mod text;

use crate::{
    args::{DeviceArgs, ModelArgs, RowsArgs},
    backend::{Device, with_backend},
    data::{self, Row, RowContent, RowLocation, RowPlace, content::Turn},
    model::{self, LoadedModel},
    recipe::Learn,
};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{Message, kernel::Kernels};
use clap::Args;
use device::DeviceTraining;
use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;

/// Arguments of `doctor`.
#[derive(Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Data file to check with; by default two short built-in rows
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Skip the checks that train an adapter
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub rows: RowsArgs,
}

/// The largest number of rows to check.
const MAX_ROWS: usize = 100;

/// The model, the data and the device that the checks run on.
pub struct CheckSubject<B: Kernels> {
    pub loaded: LoadedModel<B>,
    pub rows: Vec<Row>,
    /// The answers of a conversation that are learned.
    pub learn: Learn,
    /// Arguments to load the model again with.
    model_args: ModelArgs,
    device: B::Device,
    /// Temporary directory for the adapter that a check trains.
    adapter_dir: TempDir,
    /// Results of a short training on the device.
    training: OnceCell<DeviceTraining>,
    /// Results of the same training on the CPU.
    cpu_training: OnceCell<DeviceTraining>,
}

/// A check: its title, and the function that returns a short finding, or an error if the check fails.
pub type Check<B> = (&'static str, fn(&CheckSubject<B>) -> Result<String>);

/// Returns all checks. On any other device than the CPU, they include comparisons with the CPU if the binary supports
/// it.
#[cfg_attr(not(feature = "flex"), allow(unused))]
fn checks<B: Kernels>(device: &Device, quick: bool) -> Vec<Check<B>> {
    let mut checks: Vec<Check<B>> = vec![
        ("special tokens are known", text::special_tokens),
        ("text → tokens → the same text", text::round_trip),
        ("chat template renders turn by turn", text::template),
        ("training ends an answer as chat does", text::answer_end_token),
        ("training reads what chat sends", text::training_matches_chat),
        ("model has every token of the rows", compute::vocabulary),
        ("logits are finite", compute::finite_logits),
        ("greedy generation is deterministic", compute::deterministic_generation),
        ("cached logits = recomputed logits", compute::cached_logits),
        ("packed rows = separate rows", compute::packed_losses),
    ];
    #[cfg(feature = "flex")]
    if !device.is_cpu() {
        checks.push(("logits = CPU logits", device::logits));
    }
    if quick {
        return checks;
    }
    checks.push(("five steps of LoRA lower the loss", device::loss_decreases));
    // Threads of one process share a GPU or libtorch's threads, so only the CPU backend gives equal bits.
    if device.is_cpu() {
        checks.push(("pipeline of two = one process", pipeline::equals_one_process));
    }
    #[cfg(feature = "flex")]
    if !device.is_cpu() {
        checks.push(("LoRA gradients = CPU gradients", device::gradients));
        checks.push(("LoRA losses = CPU losses", device::losses));
        checks.push(("adapter gives the same logits on CPU", device::adapter_transfers));
    }
    checks
}

/// The error that some checks failed; the exit code is then 1 instead of 2.
#[derive(Debug)]
pub struct ChecksFailed {
    failed: usize,
    total: usize,
}

impl std::fmt::Display for ChecksFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} of {} checks failed", self.failed, self.total)
    }
}

impl std::error::Error for ChecksFailed {}

/// Runs the verb `doctor`: prints a table of checks on stdout.
///
/// # Errors
/// [`ChecksFailed`] if a check fails; another error if the model or the data cannot be read.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let mut rows = match &args.data {
        Some(path) => data::read_rows(path, &args.rows.schema()?)?,
        None => built_in_rows(),
    };
    rows.truncate(MAX_ROWS);
    with_backend!(args.device.device.ensure_ready()?, |B, device| run_checks::<B>(args, device, rows))
}

fn run_checks<B: Kernels>(args: &DoctorArgs, device: &B::Device, rows: Vec<Row>) -> Result<()> {
    let mut loaded = model::load::<B>(&args.model, DType::F32, device)?;
    loaded.tokenizer = args.rows.template.options().apply(loaded.tokenizer)?;
    let subject = CheckSubject {
        loaded,
        rows,
        learn: args.rows.learn,
        model_args: args.model.clone(),
        device: device.clone(),
        adapter_dir: tempfile::tempdir().context("a temporary folder for the adapter cannot be created")?,
        training: OnceCell::new(),
        cpu_training: OnceCell::new(),
    };
    let checks = checks(&args.device.device, args.quick);
    let mut failed = 0;
    for (name, check) in &checks {
        let (verdict, words) = match check(&subject) {
            Ok(found) => ("ok", found),
            Err(problem) => {
                failed += 1;
                ("FAIL", format!("{problem:#}"))
            }
        };
        println!("{verdict:<4}  {name:<38}{words}");
    }
    if failed > 0 {
        bail!(ChecksFailed { failed, total: checks.len() });
    }
    Ok(())
}

/// Returns one question-answer row and one conversation with two questions, without a system prompt, which not every
/// chat template supports.
fn built_in_rows() -> Vec<Row> {
    let turn = |(role, content): (&str, &str)| Turn { message: Message::new(role, content), learned: true };
    let turns = [
        ("user", "What is hypertension?"),
        ("assistant", "Blood pressure that stays above 140/90 mmHg."),
        ("user", "How is it treated?"),
        ("assistant", "With less salt, exercise and, if needed, medicine."),
    ];
    let prompt = vec![Message::new("user", "What does insulin do?")];
    let answer = RowContent::Answer { prompt, answer: "It lets cells take up glucose.".to_owned() };
    let contents = [answer, RowContent::Conversation(turns.map(turn).to_vec().into())];
    let location = |i| RowLocation { file: Arc::from(Path::new("built-in rows")), place: RowPlace::Row(i + 1) };
    contents.into_iter().enumerate().map(|(i, content)| Row { location: location(i), content }).collect()
}
