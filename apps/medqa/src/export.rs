//! The verb `export`: writes a model as a Hugging Face directory, or as a GGUF file that llama.cpp loads.

use crate::{
    args::ModelArgs,
    backend::{Device, with_backend},
    fetch::{self, is_gguf},
    identify, method_adapter,
    model::{self, LoadedModel},
    write::{create_parent_dir, write_dir_atomically},
};
use anyhow::{Context, Result, anyhow, bail};
use burn::tensor::DType;
use burn_llama::{
    Storage,
    checkpoint::{
        gguf::{BlockType, write},
        save_as,
    },
    kernel::Kernels,
};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// Numeric format of the matrices in an exported file.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportDtype {
    /// 32-bit floating point
    F32,
    /// 16-bit floating point
    F16,
    /// 8-bit integers with one scale per block of 32 values (GGUF only)
    #[value(name = "q8_0")]
    Q8_0,
}

/// Arguments of `export` and `adapters merge`.
#[derive(Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Output: FILE.gguf for a GGUF file; any other name for a new directory with config.json, model.safetensors and
    /// the tokenizer
    #[arg(long)]
    pub out: PathBuf,
    /// Numeric format of the matrices; in a GGUF file, norms and biases are always f32
    #[arg(long, default_value = "f32")]
    pub dtype: ExportDtype,
    /// Round the weights of the linear layers to nf4 and export the rounded values as floats; these are the weights
    /// that training with model.dtype = "nf4" computes with
    #[arg(long, conflicts_with = "adapter_only")]
    pub nf4: bool,
    /// Export only the adapter, as a GGUF file that llama.cpp applies with --lora to the model exported as GGUF
    #[arg(long)]
    pub adapter_only: bool,
}

/// Runs the verb `export`.
pub(crate) fn export(args: &ExportArgs) -> Result<()> {
    check_args(args)?;
    if args.adapter_only {
        export_adapter(args)?;
    } else {
        let from = fetch::resolve(&args.model.model)?;
        if from.canonicalize().is_ok_and(|from| args.out.canonicalize().is_ok_and(|to| to == from)) {
            bail!("{}: this is the model itself; choose another --out", args.out.display());
        }
        let model = from.to_str().with_context(|| format!("{}: the path is not UTF-8", from.display()))?.to_owned();
        let model = ModelArgs { model, ..args.model.clone() };
        with_backend!(Device::default(), |B, device| export_merged::<B>(&model, device, args))?;
    }
    println!("{}", args.out.display());
    Ok(())
}

fn export_merged<B: Kernels>(model: &ModelArgs, device: &B::Device, args: &ExportArgs) -> Result<()> {
    let storage = if args.nf4 { Storage::Nf4 } else { DType::F32.into() };
    let LoadedModel { model: llama, tokenizer } = model::load_without_adapters::<B>(model, storage, device)?;
    let mut loaded = LoadedModel { model: llama.unpacked(), tokenizer };
    model::add_adapters(&mut loaded, model)?;
    if !loaded.model.prompts.is_empty() {
        bail!("--adapter: expected one that can be merged into the weights, found virtual tokens; use it unmerged");
    }
    // Every adapter is activated before the first merge, so that the result does not depend on their order.
    let names: Vec<&str> = model.adapter.iter().map(|source| source.name.as_str()).collect();
    burn_peft::adapter::activate(&mut loaded.model, &names)?;
    names.iter().try_for_each(|name| burn_peft::adapter::safe_merge(&mut loaded.model, name))?;
    if is_gguf(&args.out) { write_gguf(&loaded, args) } else { write_directory(&loaded, args) }
}

/// Rejects impossible combinations of arguments before anything is loaded.
fn check_args(args: &ExportArgs) -> Result<()> {
    let (out, gguf) = (args.out.display(), is_gguf(&args.out));
    if args.adapter_only && args.model.adapter.is_empty() {
        bail!("--adapter-only needs an adapter to export; name it with --adapter DIR");
    }
    if args.adapter_only && !gguf {
        bail!("{out}: --adapter-only writes a GGUF file; expected a name that ends in .gguf");
    }
    let possible = match (gguf, args.adapter_only) {
        (false, _) => "f32 or f16 for a directory; q8_0 needs a name that ends in .gguf",
        (_, true) => "f32 or f16 for an adapter",
        (true, false) => return Ok(()),
    };
    if args.dtype == ExportDtype::Q8_0 {
        bail!("--dtype: expected {possible}, found q8_0");
    }
    if !gguf && args.out.exists() && !args.out.is_dir() {
        bail!("{out}: expected a folder or a name that ends in .gguf, found a file");
    }
    if !gguf && args.out.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!("{out}: the folder is not empty; choose another with --out");
    }
    Ok(())
}

fn block_type(dtype: ExportDtype) -> BlockType {
    match dtype {
        ExportDtype::F32 => BlockType::F32,
        ExportDtype::F16 => BlockType::F16,
        ExportDtype::Q8_0 => BlockType::Q8_0,
    }
}

fn write_gguf<B: Kernels>(loaded: &LoadedModel<B>, args: &ExportArgs) -> Result<()> {
    let notes = write::check(loaded.model.config());
    for note in
        notes.map_err(|error| anyhow!("{}: {error}; write a directory instead, by --out FOLDER", args.model.model))?
    {
        eprintln!("note: {}: {note}", args.out.display());
    }
    create_parent_dir(&args.out)?;
    let tokens = loaded.tokenizer.gguf_metadata(loaded.model.config().vocab_size)?;
    Ok(write::save(&loaded.model, tokens, block_type(args.dtype), &args.out)?)
}

fn write_directory<B: Kernels>(loaded: &LoadedModel<B>, args: &ExportArgs) -> Result<()> {
    let config = loaded.model.config();
    if config.to_json()["rope_scaling"]["rope_type"] == "factors" {
        let model = &args.model.model;
        bail!(
            "{model}: rope_freqs.weight: expected Llama 3's factors, the only ones transformers knows; export to GGUF"
        );
    }
    write_dir_atomically(&args.out, |part| {
        loaded.tokenizer.save(part)?;
        let dtype = if args.dtype == ExportDtype::F16 { DType::F16 } else { DType::F32 };
        Ok(save_as(&loaded.model, dtype, part)?)
    })
}

fn export_adapter(args: &ExportArgs) -> Result<()> {
    let [source] = args.model.adapter.as_slice() else {
        bail!("--adapter-only: expected one --adapter, found {}", args.model.adapter.len());
    };
    write_adapter_gguf(&args.model.model, &source.directory, args.dtype, &args.out)
}

/// Converts an adapter directory to a GGUF file for llama.cpp.
pub(crate) fn write_adapter_gguf(model: &str, directory: &Path, dtype: ExportDtype, out: &Path) -> Result<()> {
    let directory = &identify::adapter_directory(directory)?;
    let checkpoint = fetch::open_checkpoint(model)?;
    create_parent_dir(out)?;
    let unknown = write::save_adapter(checkpoint.config(), directory, block_type(dtype), out)?;
    method_adapter::warn_unknown_fields(directory, &unknown);
    Ok(())
}
