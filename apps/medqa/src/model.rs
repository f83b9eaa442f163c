//! Loading a model and its tokenizer, as named on the command line or in a recipe.

use crate::{
    args::ModelArgs,
    fetch, method_adapter,
    recipe::{ComputeDtype, Recipe},
};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{
    ChatTemplate, Checkpoint, Llama, Message, Storage, Tokenizer, checkpoint::gguf::Gguf, kernel::Kernels,
};
use burn_peft::Linears;
use std::path::Path;

/// A loaded model and its tokenizer.
pub struct LoadedModel<B: Kernels> {
    pub model: Llama<B>,
    pub tokenizer: Tokenizer,
}

/// Loads a model for evaluation, with at most one adapter.
pub fn load<B: Kernels>(args: &ModelArgs, storage: impl Into<Storage>, device: &B::Device) -> Result<LoadedModel<B>> {
    if let [_, second, ..] = args.adapter.as_slice() {
        bail!("--adapter: expected one here, found a second one: {}", second.directory.display());
    }
    let mut loaded = load_without_adapters(args, storage, device)?;
    add_adapters(&mut loaded, args)?;
    Ok(loaded)
}

/// Loads a model for evaluation, without its adapters.
pub fn load_without_adapters<B: Kernels>(
    args: &ModelArgs,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    let (checkpoint, tokenizer) = open_checkpoint(&args.model, args.tokenizer.as_deref())?;
    Ok(LoadedModel { model: checkpoint.load::<B>(storage, device)?, tokenizer })
}

/// Loads the adapters onto the model and activates the first one. If an adapter brings rows for single tokens, or an
/// embedding with another number of rows, the tokenizer in its folder, which knows new tokens, replaces the model's.
pub fn add_adapters<B: Kernels>(loaded: &mut LoadedModel<B>, args: &ModelArgs) -> Result<()> {
    for (index, source) in args.adapter.iter().enumerate() {
        if args.adapter[..index].iter().any(|before| before.name == source.name) {
            let (name, directory) = (&source.name, source.directory.display());
            bail!("--adapter {directory}: another one is called {name:?} already; name it: --adapter NAME={directory}");
        }
        let rows = loaded.model.config().vocab_size;
        let adapter = method_adapter::load(&mut loaded.model, &source.name, &source.directory)?;
        let grown = loaded.model.config().vocab_size != rows;
        if args.tokenizer.is_none() && (grown || adapter.has_tokens()) {
            replace_tokenizer(loaded, rows, &source.directory)?;
        }
    }
    if let [first, _, ..] = args.adapter.as_slice() {
        burn_peft::adapter::activate(&mut loaded.model, &[&first.name])?;
    }
    Ok(())
}

/// Reads the tokenizer in the folder of an adapter that changed the number of the model's rows, or warns that there is
/// none.
fn replace_tokenizer<B: Kernels>(loaded: &mut LoadedModel<B>, rows: usize, directory: &Path) -> Result<()> {
    if directory.join("tokenizer.json").is_file() {
        loaded.tokenizer = read_tokenizer(directory)?;
        return Ok(());
    }
    let (found, directory) = (loaded.model.config().vocab_size, directory.display());
    if found != rows {
        eprintln!(
            "warning: {directory}: the adapter brings an embedding with {found} rows, the model has {rows}, and there is \
             no tokenizer.json beside the adapter: tokens that were added in training are unknown here (--tokenizer DIR \
             names the tokenizer that knows them)"
        );
    }
    Ok(())
}

/// Loads a base model by its name.
pub fn load_base<B: Kernels>(name: &str, storage: impl Into<Storage>, device: &B::Device) -> Result<LoadedModel<B>> {
    let (checkpoint, tokenizer) = open_checkpoint(name, None)?;
    let model = checkpoint.load::<B>(storage, device)?;
    Ok(LoadedModel { model, tokenizer })
}

/// Loads the base model of a recipe, with `method.new_tokens` in its tokenizer and a row for each of them.
pub fn load_recipe_base<B: Kernels>(
    recipe: &Recipe,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    let mut loaded = load_base::<B>(&recipe.model.path, storage, device)?;
    let new = loaded.tokenizer.add_tokens(&recipe.method.targets.new_tokens)?;
    let rows = new.iter().max().map_or(0, |&last| last as usize + 1);
    if rows > loaded.model.config().vocab_size {
        loaded.model.resize_token_embeddings(rows);
    }
    Ok(loaded)
}

/// Sets the numeric format of the model's matrix products.
///
/// # Errors
/// If the device does not support the format.
pub fn with_compute<B: Kernels>(model: Llama<B>, compute: ComputeDtype) -> Result<Llama<B>> {
    let (name, dtype) = match compute {
        ComputeDtype::F32 => ("f32", DType::F32),
        ComputeDtype::Bf16 => ("bf16", DType::BF16),
        ComputeDtype::F16 => ("f16", DType::F16),
    };
    if !B::supports_dtype(&model.device(), dtype) {
        bail!("this device does not support matrix products in {name}; use f32, or the device cpu, tch or cuda");
    }
    Ok(model.with_matmul_precision(compute.into()))
}

/// Opens a model's checkpoint, without loading the weights, and reads its tokenizer, or the one at the path `instead`.
pub fn open_checkpoint(name: &str, instead: Option<&Path>) -> Result<(Checkpoint, Tokenizer)> {
    let path = fetch::resolve(name)?;
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = match (instead, checkpoint.gguf()) {
        (Some(path), _) => read_tokenizer(path)?,
        (None, Some(gguf)) => Tokenizer::from_gguf(gguf)?,
        (None, None) => read_tokenizer(&path)?,
    };
    Ok((checkpoint, tokenizer))
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() { Ok(Tokenizer::from_dir(path)?) } else { Ok(Tokenizer::from_gguf(&Gguf::open(path)?)?) }
}

/// Reads a model's tokenizer without loading the model.
pub fn load_tokenizer(args: &ModelArgs) -> Result<Tokenizer> {
    match &args.tokenizer {
        Some(path) => read_tokenizer(path),
        None => read_tokenizer(&fetch::resolve(&args.model)?),
    }
}

/// Returns the model's chat template.
pub fn chat_template(tokenizer: &Tokenizer) -> Result<&ChatTemplate> {
    tokenizer
        .chat_template()
        .with_context(|| format!("{}: no chat template; use an instruction-tuned model", tokenizer.path().display()))
}

/// Encodes a conversation with the model's chat template, up to where the assistant's next answer begins.
pub fn apply_chat_template(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    // The template writes the special tokens itself.
    Ok(tokenizer.encode(&chat_template(tokenizer)?.render(messages, true)?, false)?)
}
