//! Loading a model and its tokenizer, as named on the command line or in a recipe.

use crate::{
    args::ModelArgs,
    fetch,
    identify::{self, Purpose},
    method_adapter,
    recipe::ComputeDtype,
    template,
};
use anyhow::{Result, bail};
use burn::tensor::DType;
use burn_llama::{
    ChatTemplate, Checkpoint, Llama, LlamaConfig, Message, Storage, Tokenizer, checkpoint::gguf::Gguf, kernel::Kernels,
};
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
    add_adapters(&mut loaded.model, args)?;
    Ok(loaded)
}

/// Loads a model for evaluation, without its adapters.
pub fn load_without_adapters<B: Kernels>(
    args: &ModelArgs,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    // Loading the weights takes longer than finding out that an adapter is none.
    identify::adapter_directories(args.adapter.iter().map(|source| source.directory.as_path()))?;
    let (checkpoint, tokenizer) = open_checkpoint(&args.model, args.tokenizer.as_deref())?;
    let tokenizer = with_saved_template(tokenizer, args)?;
    Ok(LoadedModel { model: checkpoint.load::<B>(storage, device)?, tokenizer })
}

/// Loads the adapters onto the model and activates the first one.
pub fn add_adapters<B: Kernels>(model: &mut Llama<B>, args: &ModelArgs) -> Result<()> {
    for (index, source) in args.adapter.iter().enumerate() {
        if args.adapter[..index].iter().any(|before| before.name == source.name) {
            let (name, directory) = (&source.name, source.directory.display());
            bail!("--adapter {directory}: another one is called {name:?} already; name it: --adapter NAME={directory}");
        }
        method_adapter::load(model, &source.name, &source.directory)?;
    }
    if let [first, _, ..] = args.adapter.as_slice() {
        burn_peft::adapter::activate(model, &[&first.name])?;
    }
    Ok(())
}

/// Loads a base model by its name.
pub fn load_base<B: Kernels>(name: &str, storage: impl Into<Storage>, device: &B::Device) -> Result<LoadedModel<B>> {
    let (checkpoint, tokenizer) = open_checkpoint(name, None)?;
    let model = checkpoint.load::<B>(storage, device)?;
    Ok(LoadedModel { model, tokenizer })
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
    let checkpoint = fetch::open(&path)?;
    let tokenizer = match (instead, checkpoint.gguf()) {
        (Some(path), _) => read_tokenizer(path)?,
        (None, Some(gguf)) => Tokenizer::from_gguf(gguf)?,
        (None, None) => read_tokenizer(&path)?,
    };
    Ok((checkpoint, tokenizer))
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let tokenizer = match path.is_dir() {
        true => Tokenizer::from_dir(path),
        false => Gguf::open(path).and_then(|file| Tokenizer::from_gguf(&file)),
    };
    tokenizer.map_err(|error| identify::explain(error.into(), path, Purpose::Tokenizer))
}

/// Reads a model's tokenizer without loading the model.
pub fn load_tokenizer(args: &ModelArgs) -> Result<Tokenizer> {
    let tokenizer = match &args.tokenizer {
        Some(path) => read_tokenizer(path)?,
        None => read_tokenizer(&fetch::resolve(&args.model)?)?,
    };
    with_saved_template(tokenizer, args)
}

/// Applies the chat template that is saved with the first adapter. A conversation has one template, so it is noted if
/// another adapter comes with another one.
fn with_saved_template(tokenizer: Tokenizer, args: &ModelArgs) -> Result<Tokenizer> {
    let Some((first, others)) = args.adapter.split_first() else { return Ok(tokenizer) };
    let tokenizer = template::apply_saved(tokenizer, &first.directory)?;
    let used = tokenizer.chat_template().map(ChatTemplate::source);
    for other in others {
        let path = other.directory.join("chat_template.jinja");
        if std::fs::read_to_string(&path).is_ok_and(|source| Some(source.as_str()) != used) {
            let (path, first) = (path.display(), first.directory.display());
            eprintln!("note: {path} is not used: it differs from the chat template of the first adapter, {first}");
        }
    }
    Ok(tokenizer)
}

/// Returns the number of positions that the model supports, without loading it; none if there is no limit, or if only a
/// tokenizer is there.
pub fn position_limit(args: &ModelArgs) -> Result<Option<usize>> {
    if args.tokenizer.is_some() {
        return Ok(None);
    }
    let path = fetch::resolve(&args.model)?;
    let config = path.join("config.json");
    if path.is_dir() {
        return Ok(if config.is_file() { LlamaConfig::load(&config)?.position_limit() } else { None });
    }
    Ok(Checkpoint::open(&path)?.config().position_limit())
}

/// Encodes a conversation with the model's chat template, up to where the assistant's next answer begins. Texts of
/// control tokens in the messages are ordinary text.
pub fn apply_chat_template(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    template::chat_template(tokenizer)?;
    Ok(tokenizer.apply_chat_template(messages, None, true)?)
}
