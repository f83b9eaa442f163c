//! Loading a model and its tokenizer, as named on the command line or in a recipe.

use crate::{
    args::ModelArgs,
    fetch,
    identify::{self, Purpose},
    method_adapter,
    recipe::{ComputeDtype, Recipe},
    template::{self, TemplateOptions},
};
use anyhow::{Result, bail};
use burn::tensor::DType;
use burn_llama::{
    ChatTemplate, Checkpoint, HeldSegments, Llama, LlamaConfig, Message, Storage, Tokenizer, checkpoint::gguf::Gguf,
    kernel::Kernels,
};
use burn_peft::Linears;
use std::path::{Path, PathBuf};

/// A loaded model and its tokenizer.
pub struct LoadedModel<B: Kernels> {
    pub model: Llama<B>,
    pub tokenizer: Tokenizer,
}

/// Loads a model for evaluation, with at most one adapter.
pub(crate) fn load<B: Kernels>(
    args: &ModelArgs,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    if let [_, second, ..] = args.adapter.as_slice() {
        bail!("--adapter: expected one here, found a second one: {}", second.directory.display());
    }
    let mut loaded = load_without_adapters(args, storage, device)?;
    add_adapters(&mut loaded, args)?;
    Ok(loaded)
}

/// Loads a model for evaluation, without its adapters.
pub(crate) fn load_without_adapters<B: Kernels>(
    args: &ModelArgs,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    // Loading the weights takes longer than finding out that an adapter is none.
    let adapters = adapter_directories(args)?;
    let (checkpoint, tokenizer) = open_checkpoint(&args.model, tokenizer_path(args, &adapters).as_deref())?;
    let tokenizer = with_saved_template(tokenizer, &adapters)?;
    Ok(LoadedModel { model: checkpoint.load::<B>(storage, device)?, tokenizer })
}

/// Returns the directories of the adapters.
fn adapter_directories(args: &ModelArgs) -> Result<Vec<PathBuf>> {
    identify::adapter_directories(args.adapter.iter().map(|source| source.directory.as_path()))
}

/// Returns the place of the tokenizer, if it is not the model's: the one that is named, or the one in the folder of the
/// first adapter, which knows the tokens that were added in training. PEFT's `AutoPeftModel` takes the same.
fn tokenizer_path(args: &ModelArgs, adapters: &[PathBuf]) -> Option<PathBuf> {
    let beside_adapter = || adapters.first().filter(|directory| has_tokenizer(directory)).cloned();
    args.tokenizer.clone().or_else(beside_adapter)
}

fn has_tokenizer(directory: &Path) -> bool {
    directory.join("tokenizer.json").is_file()
}

/// Loads the adapters onto the model and activates the first one. A note says which tokens of an adapter the tokenizer
/// does not know.
pub(crate) fn add_adapters<B: Kernels>(loaded: &mut LoadedModel<B>, args: &ModelArgs) -> Result<()> {
    for (index, (source, directory)) in args.adapter.iter().zip(adapter_directories(args)?).enumerate() {
        if args.adapter[..index].iter().any(|before| before.name == source.name) {
            let (name, directory) = (&source.name, source.directory.display());
            bail!("--adapter {directory}: another one is called {name:?} already; name it: --adapter NAME={directory}");
        }
        let rows = loaded.model.config().vocab_size;
        let adapter = method_adapter::load(&mut loaded.model, &source.name, &directory)?;
        let (found, known) = (loaded.model.config().vocab_size, has_tokenizer(&directory));
        let at = directory.display();
        if args.tokenizer.is_none() && found != rows && !known {
            eprintln!(
                "note: {at}: the adapter brings an embedding with {found} rows, the model has {rows}, and there is no \
                 tokenizer.json beside the adapter: tokens that were added in training are unknown here; --tokenizer DIR \
                 names a tokenizer that knows them"
            );
        } else if args.tokenizer.is_none() && index > 0 && known && adapter.has_tokens() {
            eprintln!(
                "note: {at}: its tokenizer.json is not used, since another adapter comes first; --tokenizer DIR names it"
            );
        }
    }
    if let [first, _, ..] = args.adapter.as_slice() {
        burn_peft::adapter::activate(&mut loaded.model, &[&first.name])?;
    }
    Ok(())
}

/// Loads a base model by its name.
pub(crate) fn load_base<B: Kernels>(
    name: &str,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    let (checkpoint, tokenizer) = open_checkpoint(name, None)?;
    let model = checkpoint.load::<B>(storage, device)?;
    Ok(LoadedModel { model, tokenizer })
}

/// The base model of a recipe, of which any segments can be loaded.
pub(crate) struct RecipeBase {
    checkpoint: Checkpoint,
    /// The rows of the embedding that `method.new_tokens` need.
    rows: usize,
}

impl RecipeBase {
    /// Opens the base model of a recipe. Its tokenizer has `method.new_tokens` and the recipe's chat template.
    pub(crate) fn open(recipe: &Recipe) -> Result<(Self, Tokenizer)> {
        let (checkpoint, mut tokenizer) = open_checkpoint(&recipe.model.path, None)?;
        let new = tokenizer.add_tokens(&recipe.method.targets.new_tokens)?;
        let rows = new.iter().max().map_or(0, |&last| last as usize + 1);
        Ok((Self { checkpoint, rows }, TemplateOptions::from(recipe).apply(tokenizer)?))
    }

    /// Returns the configuration of the model in the files, without new tokens.
    pub(crate) fn config(&self) -> &LlamaConfig {
        self.checkpoint.config()
    }

    /// Loads segments of the model, with a row for each of `method.new_tokens`.
    pub(crate) fn load<B: Kernels>(
        &self,
        held: &HeldSegments,
        storage: impl Into<Storage>,
        device: &B::Device,
    ) -> Result<Llama<B>> {
        let mut model = self.checkpoint.load_segments::<B>(held, storage, device)?;
        if self.rows > model.config().vocab_size {
            model.resize_token_embeddings(self.rows);
        }
        Ok(model)
    }
}

/// Loads the base model of a recipe as [`RecipeBase`] does, all of it.
pub(crate) fn load_recipe_base<B: Kernels>(
    recipe: &Recipe,
    storage: impl Into<Storage>,
    device: &B::Device,
) -> Result<LoadedModel<B>> {
    let (base, tokenizer) = RecipeBase::open(recipe)?;
    Ok(LoadedModel { model: base.load(&HeldSegments::all(), storage, device)?, tokenizer })
}

/// Sets the numeric format of the model's matrix products.
///
/// # Errors
/// If the device does not support the format.
pub(crate) fn with_compute<B: Kernels>(model: Llama<B>, compute: ComputeDtype) -> Result<Llama<B>> {
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
pub(crate) fn open_checkpoint(name: &str, instead: Option<&Path>) -> Result<(Checkpoint, Tokenizer)> {
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
pub(crate) fn load_tokenizer(args: &ModelArgs) -> Result<Tokenizer> {
    let adapters = adapter_directories(args)?;
    let tokenizer = match tokenizer_path(args, &adapters) {
        Some(path) => read_tokenizer(&path)?,
        None => read_tokenizer(&fetch::resolve(&args.model)?)?,
    };
    with_saved_template(tokenizer, &adapters)
}

/// Applies the chat template that is saved with the first adapter. A conversation has one template, so it is noted if
/// another adapter comes with another one.
fn with_saved_template(tokenizer: Tokenizer, adapters: &[PathBuf]) -> Result<Tokenizer> {
    let Some((first, others)) = adapters.split_first() else { return Ok(tokenizer) };
    let tokenizer = template::apply_saved(tokenizer, first)?;
    let used = tokenizer.chat_template().map(ChatTemplate::source);
    for other in others {
        let path = other.join("chat_template.jinja");
        if std::fs::read_to_string(&path).is_ok_and(|source| Some(source.as_str()) != used) {
            let (path, first) = (path.display(), first.display());
            eprintln!("note: {path} is not used: it differs from the chat template of the first adapter, {first}");
        }
    }
    Ok(tokenizer)
}

/// Returns the number of positions that the model supports, without loading it; none if there is no limit, or if only a
/// tokenizer is there.
pub(crate) fn position_limit(args: &ModelArgs) -> Result<Option<usize>> {
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
pub(crate) fn apply_chat_template(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    template::chat_template(tokenizer)?;
    Ok(tokenizer.apply_chat_template(messages, None, true)?)
}
