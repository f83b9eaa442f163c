//! The verb `consolidate`: merges the shards of a checkpoint into one model or adapter.

use super::{
    method::{FittedModel, apply_method},
    run_output::RunOutput,
    state::{self, STATE_FILE},
};
use crate::{
    backend::{Device, with_backend},
    model,
    recipe::{MethodKind, Recipe},
    write::write_dir_atomically,
};
use anyhow::{Context, Result, bail};
use burn::backend::Autodiff;
use burn_llama::kernel::Kernels;
use clap::Args;
use std::path::{Path, PathBuf};

/// Arguments of `consolidate`.
#[derive(Args)]
pub(crate) struct ConsolidateArgs {
    /// Run directory, whose last checkpoint is used, or one of its checkpoint directories
    pub checkpoint: PathBuf,
    /// New directory for the result: a Hugging Face model, or an adapter in PEFT's format
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the verb `consolidate` in one process. It reads only the weights, of a run with any number of ranks and any
/// ZeRO stage.
///
/// # Errors
/// One line that names the folder or the file.
pub(crate) fn consolidate(args: &ConsolidateArgs) -> Result<()> {
    let (run, checkpoint) = find_checkpoint(&args.checkpoint)?;
    let out = args.out.display();
    if args.out.exists() {
        bail!("{out}: it exists already; choose another --out");
    }
    let recipe = state::read_recipe(&run)?;
    if recipe.method.common.kind == MethodKind::AdaLora {
        bail!(
            "{}: a checkpoint of AdaLoRA has its adapter already, in {}/adapter",
            run.display(),
            checkpoint.display()
        );
    }
    let state = checkpoint.join(STATE_FILE);
    with_backend!(Device::default(), |B, device| write_dir_atomically(&args.out, |part| write::<B>(
        &recipe, &state, part, device
    )))?;
    println!("{out}");
    Ok(())
}

/// Returns the run directory and its checkpoint.
fn find_checkpoint(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let at = folder.display();
    if folder.join("recipe.toml").is_file() {
        let newest = state::checkpoints(folder)?.pop();
        let newest = newest.with_context(|| format!("{at}: expected a run with a checkpoint, found none"))?;
        return Ok((folder.to_owned(), newest));
    }
    let run = folder.canonicalize().ok().and_then(|folder| Some(folder.parent()?.to_owned()));
    match run.filter(|run| run.join("recipe.toml").is_file()) {
        Some(run) => Ok((run, folder.to_owned())),
        None => bail!("{at}: expected a run directory or a checkpoint in one, found no recipe.toml in it or above it"),
    }
}

/// Writes the model or adapter whose trained weights are in the files at `state` into the folder `out`.
///
/// # Errors
/// If the base model or `state` cannot be read, or a file cannot be written.
pub(super) fn write<B: Kernels>(recipe: &Recipe, state: &Path, out: &Path, device: &B::Device) -> Result<()> {
    let dtype = recipe.model.dtype.unwrap_or_default();
    let loaded = model::load_recipe_base::<Autodiff<B>>(recipe, dtype, device)?;
    let FittedModel { model, adapter, .. } = apply_method(loaded.model, &loaded.tokenizer, recipe)?;
    let model = burn_zero::restore_weights::<Autodiff<B>, _>(model, state)?;
    RunOutput::new(adapter, loaded.tokenizer).save(&model, out)
}
