//! A model for other programs: a Hugging Face directory, or a GGUF file that llama.cpp loads.

use crate::{
    backend::{Device, on},
    cli::{ExportArgs, ModelArgs, Precision},
    fetch,
    model::{self, Loaded},
    write::{parent, whole_folder},
};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{
    Checkpoint, Storage,
    checkpoint::{
        gguf::{BlockType, write},
        save_as,
    },
    kernel::Kernels,
};
use std::path::Path;

/// The verb `export`.
pub fn export(args: &ExportArgs) -> Result<()> {
    let gguf = args.out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    check(args, gguf)?;
    if args.adapter_only {
        adapter_only(args)?;
    } else {
        let from = fetch::resolve(&args.model.model)?;
        if from.canonicalize().is_ok_and(|from| args.out.canonicalize().is_ok_and(|to| to == from)) {
            bail!("{}: this is the model itself; choose another --out", args.out.display());
        }
        let model = from.to_str().with_context(|| format!("{}: the name is no UTF-8", from.display()))?.to_owned();
        let model = ModelArgs { model, ..args.model.clone() };
        on!(Device::default(), |B, place| merged::<B>(&model, place, (args, gguf)))?;
    }
    println!("{}", args.out.display());
    Ok(())
}

fn merged<B: Kernels>(model: &ModelArgs, device: &B::Device, (args, gguf): (&ExportArgs, bool)) -> Result<()> {
    let storage = if args.nf4 { Storage::Nf4 } else { DType::F32.into() };
    let Loaded { model: llama, tokenizer } = model::without_adapters::<B>(model, storage, device)?;
    let mut loaded = Loaded { model: llama.unpacked(), tokenizer };
    model::add_adapters(&mut loaded.model, model)?;
    if !loaded.model.prompts.is_empty() {
        bail!(
            "--adapter: expected one that can be merged into weights, found virtual tokens; load them beside the model"
        );
    }
    // All of them before the first merge: what they add does not depend on the order then.
    let names: Vec<&str> = model.adapter.iter().map(|source| source.name.as_str()).collect();
    burn_peft::adapter::activate(&mut loaded.model, &names)?;
    names.iter().try_for_each(|name| burn_peft::adapter::safe_merge(&mut loaded.model, name))?;
    if gguf { file(&loaded, args) } else { directory(&loaded, args) }
}

/// Refuses what cannot be, before anything is loaded.
fn check(args: &ExportArgs, gguf: bool) -> Result<()> {
    let out = args.out.display();
    if args.adapter_only && args.model.adapter.is_empty() {
        bail!("--adapter-only writes the adapter of --adapter DIR, which is missing");
    }
    if args.adapter_only && !gguf {
        bail!("{out}: an adapter by itself is written as a GGUF file; end the name in .gguf");
    }
    let possible = match (gguf, args.adapter_only) {
        (false, _) => "f32 or f16 for a directory; q8_0 needs a name that ends in .gguf",
        (_, true) => "f32 or f16 for an adapter",
        (true, false) => return Ok(()),
    };
    if args.dtype == Precision::Q8_0 {
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

fn kind(precision: Precision) -> BlockType {
    match precision {
        Precision::F32 => BlockType::F32,
        Precision::F16 => BlockType::F16,
        Precision::Q8_0 => BlockType::Q8_0,
    }
}

fn file<B: Kernels>(loaded: &Loaded<B>, args: &ExportArgs) -> Result<()> {
    parent(&args.out)?;
    let tokens = loaded.tokenizer.gguf_metadata(loaded.model.config().vocab_size)?;
    Ok(write::save(&loaded.model, tokens, kind(args.dtype), &args.out)?)
}

fn directory<B: Kernels>(loaded: &Loaded<B>, args: &ExportArgs) -> Result<()> {
    let config = loaded.model.config();
    if config.to_json()["rope_scaling"]["rope_type"] == "factors" {
        let model = &args.model.model;
        bail!(
            "{model}: rope_freqs.weight: expected Llama 3's divisors, the only ones transformers knows; export to GGUF"
        );
    }
    whole_folder(&args.out, |part| {
        loaded.tokenizer.save(part)?;
        let dtype = if args.dtype == Precision::F16 { DType::F16 } else { DType::F32 };
        Ok(save_as(&loaded.model, dtype, part)?)
    })
}

fn adapter_only(args: &ExportArgs) -> Result<()> {
    let [source] = args.model.adapter.as_slice() else {
        bail!("--adapter-only: expected one --adapter, found {}", args.model.adapter.len());
    };
    adapter_file(&args.model.model, &source.directory, (args.dtype, &args.out))
}

/// Writes an adapter's directory as llama.cpp's file.
pub fn adapter_file(model: &str, directory: &Path, (precision, out): (Precision, &Path)) -> Result<()> {
    let checkpoint = Checkpoint::open(&fetch::resolve(model)?)?;
    parent(out)?;
    let unknown = write::save_adapter(checkpoint.config(), directory, kind(precision), out)?;
    model::warn_unknown(directory, &unknown);
    Ok(())
}
