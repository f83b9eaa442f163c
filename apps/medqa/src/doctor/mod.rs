//! Laws that a set-up must obey for training to teach what chat will use, tried on the user's own model and rows.

mod compute;
mod device;
mod text;

use crate::{
    backend::{Device, on},
    cli::{DoctorArgs, ModelArgs},
    data::{self, Content, Row, content::Turn, source::Place},
    model::{self, Loaded},
};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{Message, kernel::Kernels};
use device::Trained;
use std::cell::OnceCell;
use tempfile::TempDir;

/// So many rows are looked at.
const ROWS: usize = 100;

/// What the laws are tried on.
pub struct Subject<B: Kernels> {
    pub loaded: Loaded<B>,
    pub rows: Vec<Row>,
    /// To load the model again.
    args: ModelArgs,
    device: B::Device,
    /// For the adapter that is trained.
    folder: TempDir,
    trained: OnceCell<Trained>,
    reference: OnceCell<Trained>,
}

/// A law: what it found in a few words, or how it is broken.
pub type Law<B> = (&'static str, fn(&Subject<B>) -> Result<String>);

/// Every law. Where another device computes, what it finds is held against this machine's processor, if the binary has it.
#[cfg_attr(not(feature = "flex"), allow(unused))]
fn laws<B: Kernels>(device: &Device, quick: bool) -> Vec<Law<B>> {
    let mut laws: Vec<Law<B>> = vec![
        ("special tokens are known", text::special_tokens),
        ("text → tokens → the same text", text::round_trip),
        ("chat template renders turn by turn", text::template),
        ("training ends an answer as chat does", text::ending),
        ("training reads what chat sends", text::training_is_chat),
        ("model has every token of the rows", compute::vocabulary),
        ("logits are finite", compute::finite),
        ("greedy generation repeats itself", compute::repeatable),
        ("cached logits = recomputed logits", compute::cached),
        ("packed rows = separate rows", compute::packed),
    ];
    #[cfg(feature = "flex")]
    if !device.is_cpu() {
        laws.push(("logits = the processor's", device::logits));
    }
    if quick {
        return laws;
    }
    laws.push(("five steps of LoRA lower the loss", device::learns));
    #[cfg(feature = "flex")]
    if !device.is_cpu() {
        laws.push(("gradients of LoRA = the processor's", device::gradients));
        laws.push(("losses of LoRA = the processor's", device::losses));
        laws.push(("its adapter serves on the processor", device::serves));
    }
    laws
}

/// Some laws are broken. The verb's exit code is 1 then, not 2.
#[derive(Debug)]
pub struct Failed {
    broken: usize,
    laws: usize,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} of {} checks failed", self.broken, self.laws)
    }
}

impl std::error::Error for Failed {}

/// The verb `doctor`: a table of checks on stdout.
///
/// # Errors
/// [`Failed`] if a law is broken; another if model or rows cannot be read.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let mut rows = match &args.data {
        Some(path) => data::read(path, &args.rows.schema()?)?,
        None => own_rows(),
    };
    rows.truncate(ROWS);
    on!(args.device.device.ready()?, |B, place| table::<B>(args, place, rows))
}

fn table<B: Kernels>(args: &DoctorArgs, device: &B::Device, rows: Vec<Row>) -> Result<()> {
    let subject = Subject {
        loaded: model::load::<B>(&args.model, DType::F32, device)?,
        rows,
        args: args.model.clone(),
        device: device.clone(),
        folder: tempfile::tempdir().context("a folder for an adapter cannot be made")?,
        trained: OnceCell::new(),
        reference: OnceCell::new(),
    };
    let laws = laws(&args.device.device, args.quick);
    let mut broken = 0;
    for (name, law) in &laws {
        let (verdict, words) = match law(&subject) {
            Ok(found) => ("ok", found),
            Err(problem) => {
                broken += 1;
                ("FAIL", format!("{problem:#}"))
            }
        };
        println!("{verdict:<4}  {name:<38}{words}");
    }
    if broken > 0 {
        bail!(Failed { broken, laws: laws.len() });
    }
    Ok(())
}

/// One question, and a conversation of two; without a system prompt, which not every template takes.
fn own_rows() -> Vec<Row> {
    let turn = |(role, content): (&str, &str)| Turn { message: Message::new(role, content), learned: true };
    let turns = [
        ("user", "What is hypertension?"),
        ("assistant", "Blood pressure that stays above 140/90 mmHg."),
        ("user", "How is it treated?"),
        ("assistant", "With less salt, exercise and, if needed, medicine."),
    ];
    let prompt = vec![Message::new("user", "What does insulin do?")];
    let answer = Content::Answer { prompt, answer: "It lets cells take up glucose.".to_owned() };
    let contents = [answer, Content::Conversation(turns.map(turn).into())];
    contents.into_iter().enumerate().map(|(i, content)| Row { place: Place::Row(i + 1), content }).collect()
}
