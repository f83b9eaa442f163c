//! A model with its tokenizer, as the user named it.

use crate::{adapter, cli::ModelArgs, fetch, recipe::Compute};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{
    ChatTemplate, Checkpoint, Llama, Message, Storage, Tokenizer, checkpoint::gguf::Gguf, kernel::Kernels,
};
use std::path::Path;

/// A model that is ready to compute.
pub struct Loaded<B: Kernels> {
    pub model: Llama<B>,
    pub tokenizer: Tokenizer,
}

/// Loads a model for evaluation, with its adapter.
pub fn load<B: Kernels>(args: &ModelArgs, storage: impl Into<Storage>, device: &B::Device) -> Result<Loaded<B>> {
    if let [_, second, ..] = args.adapter.as_slice() {
        bail!("--adapter: expected one here, found a second one: {}", second.directory.display());
    }
    let mut loaded = without_adapters(args, storage, device)?;
    add_adapters(&mut loaded.model, args)?;
    Ok(loaded)
}

/// Loads a model for evaluation, without the adapters.
pub fn without_adapters<B: Kernels>(
    args: &ModelArgs,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<Loaded<B>> {
    let (checkpoint, tokenizer) = open(&args.model, args.tokenizer.as_deref())?;
    Ok(Loaded { model: checkpoint.load::<B>(storage, device)?, tokenizer })
}

/// Puts the adapters onto the model. The first is active.
pub fn add_adapters<B: Kernels>(model: &mut Llama<B>, args: &ModelArgs) -> Result<()> {
    for (index, source) in args.adapter.iter().enumerate() {
        if args.adapter[..index].iter().any(|before| before.name == source.name) {
            let (name, directory) = (&source.name, source.directory.display());
            bail!("--adapter {directory}: another one is called {name:?} already; name it: --adapter NAME={directory}");
        }
        adapter::load(model, &source.name, &source.directory)?;
    }
    if let [first, _, ..] = args.adapter.as_slice() {
        burn_peft::adapter::activate(model, &[&first.name])?;
    }
    Ok(())
}

/// Loads a model without adapters.
pub fn base<B: Kernels>(name: &str, storage: impl Into<Storage>, device: &B::Device) -> Result<Loaded<B>> {
    let (checkpoint, tokenizer) = open(name, None)?;
    let model = checkpoint.load::<B>(storage, device)?;
    Ok(Loaded { model, tokenizer })
}

/// The model with its products computed so.
pub fn computing<B: Kernels>(model: Llama<B>, compute: Compute) -> Result<Llama<B>> {
    let (name, dtype) = match compute {
        Compute::F32 => ("f32", DType::F32),
        Compute::Bf16 => ("bf16", DType::BF16),
        Compute::F16 => ("f16", DType::F16),
    };
    if !B::supports_dtype(&model.device(), dtype) {
        bail!("products of {name}: this device has no {name}; take f32, or the devices cpu, tch or cuda");
    }
    Ok(model.computing_in(compute.into()))
}

/// A model's sizes and its tokenizer, or the one in `instead`; the weights stay in their files.
pub fn open(name: &str, instead: Option<&Path>) -> Result<(Checkpoint, Tokenizer)> {
    let path = fetch::resolve(name)?;
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = match (instead, checkpoint.gguf()) {
        (Some(path), _) => tokenizer(path)?,
        (None, Some(gguf)) => Tokenizer::from_gguf(gguf)?,
        (None, None) => tokenizer(&path)?,
    };
    Ok((checkpoint, tokenizer))
}

fn tokenizer(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() { Ok(Tokenizer::from_dir(path)?) } else { Ok(Tokenizer::from_gguf(&Gguf::open(path)?)?) }
}

/// Says which fields of an adapter's configuration have no effect here.
pub fn warn_unknown(directory: &Path, unknown: &[String]) {
    if !unknown.is_empty() {
        eprintln!("warning: {}: fields not known here are passed over: {}", directory.display(), unknown.join(", "));
    }
}

/// The tokenizer of a model, without the model.
pub fn tokenizer_of(args: &ModelArgs) -> Result<Tokenizer> {
    match &args.tokenizer {
        Some(path) => tokenizer(path),
        None => tokenizer(&fetch::resolve(&args.model)?),
    }
}

/// The model's chat template.
pub fn template(tokenizer: &Tokenizer) -> Result<&ChatTemplate> {
    tokenizer
        .chat_template()
        .with_context(|| format!("{}: no chat template; use an instruction-tuned model", tokenizer.path().display()))
}

/// The tokens of a conversation by the model's own template, ready for the assistant's next words.
pub fn conversation(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    // The template writes the special tokens itself.
    Ok(tokenizer.encode(&template(tokenizer)?.render(messages, true)?, false)?)
}
