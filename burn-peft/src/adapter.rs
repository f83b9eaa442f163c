//! Adapters on a whole model: attach, read, write, merge.

use crate::{Error, Linear, Lora, LoraConfig, TargetModules, format, kernel::LinearKernels};
use burn::tensor::{DType, Tensor, TensorData};
use std::{collections::BTreeSet, path::Path};

/// A model that shows its linear layers, each with its path in the checkpoint.
///
/// This is all that adapters need to know of a model.
pub trait Linears<B: LinearKernels> {
    /// Calls `visit` with every linear layer and its path, such as `model.layers.0.self_attn.q_proj`.
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>));

    /// As [`Linears::linears`], for changing them.
    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>));
}

/// The paths that `config` selects.
///
/// # Errors
/// If nothing is selected, or the configuration is not possible.
pub fn targets<B: LinearKernels, M: Linears<B>>(model: &M, config: &LoraConfig) -> Result<Vec<String>, Error> {
    config.check()?;
    let (matcher, mut selected, mut names) = (config.target_modules.matcher()?, Vec::new(), BTreeSet::new());
    model.linears(&mut |path, _| {
        if matcher.selects(path) {
            selected.push(path.to_owned());
        }
        names.insert(path.rsplit('.').next().unwrap_or(path).to_owned());
    });
    if selected.is_empty() {
        let available = names.into_iter().collect::<Vec<_>>().join(", ");
        return Err(Error::NoTarget { target: config.target_modules.to_string(), available });
    }
    Ok(selected)
}

/// Adds a new adapter to every layer that `config` selects. It changes nothing yet, and its start depends on `seed` and the
/// layers' paths only. Nothing is frozen here: see [`crate::param::train_only`] and [`is_adapter`].
///
/// # Errors
/// If nothing is selected or the name is taken.
pub fn attach<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    config: &LoraConfig,
    seed: u64,
) -> Result<(), Error> {
    let selected: BTreeSet<String> = targets(model, config)?.into_iter().collect();
    name_is_free(model, name)?;
    model.linears_mut(&mut |path, linear| {
        if selected.contains(path) {
            linear.attach(path, name, config, seed);
        }
    });
    Ok(())
}

/// Reads PEFT's adapter directory and adds it to the model under `name`. Returns its configuration and the names of
/// configuration fields that were not understood.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<(LoraConfig, Vec<String>), Error> {
    let (config, mut tensors, unknown) = format::read(directory)?;
    name_is_free(model, name)?;
    let selected: BTreeSet<String> = targets(model, &config)?.into_iter().collect();
    let mut problems = Vec::new();
    let mut found = Vec::new();
    model.linears(&mut |path, linear| {
        if selected.contains(path) {
            let [out, features] = linear.shape();
            for (part, shape) in [("lora_A", [config.r, features]), ("lora_B", [out, config.r])] {
                let key = format::key(path, part);
                match tensors.remove(&key) {
                    Some(tensor) if tensor.shape.as_slice() == shape => found.push(tensor),
                    Some(tensor) => {
                        problems.push(format!("{key}: expected {shape:?}, found {:?}", tensor.shape.as_slice()))
                    }
                    None => problems.push(format!("{key} is missing")),
                }
            }
        }
    });
    problems.extend(tensors.into_keys().map(|key| format!("{key} belongs to no selected layer")));
    if !problems.is_empty() {
        return Err(Error::Mismatch { path: directory.to_owned(), message: problems.join("; ") });
    }
    let mut found = found.into_iter();
    model.linears_mut(&mut |path, linear| {
        if selected.contains(path)
            && let (Some(a), Some(b)) = (found.next(), found.next())
        {
            let device = linear.weight.lazy_device();
            let tensor = |data: TensorData| Tensor::<B, 2>::from_data(data, (&device, DType::F32));
            linear.adapters.push(Lora::from_tensors(path, name, &config, tensor(a), tensor(b)));
        }
    });
    Ok((config, unknown))
}

/// Writes the named adapter as PEFT's directory.
///
/// # Errors
/// If the model has no such adapter or the directory cannot be written.
pub fn save<B: LinearKernels, M: Linears<B>>(
    model: &M,
    name: &str,
    config: &LoraConfig,
    directory: &Path,
) -> Result<(), Error> {
    let (mut tensors, mut targets) = (Vec::new(), BTreeSet::new());
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            tensors.push((format::key(path, "lora_A"), adapter.lora_a.val().into_data()));
            tensors.push((format::key(path, "lora_B"), adapter.lora_b.val().into_data()));
            targets.insert(path.rsplit('.').next().unwrap_or(path).to_owned());
        }
    });
    if tensors.is_empty() {
        return Err(Error::Name { name: name.to_owned(), state: "is on no layer of the model" });
    }
    let mut config = config.clone();
    // As PEFT does: a wildcard is written as the names that it stood for.
    if matches!(&config.target_modules, TargetModules::Pattern(p) if p == "all-linear") {
        config.target_modules = TargetModules::Suffixes(targets.into_iter().collect());
    }
    format::write(directory, &config.to_json(), tensors)
}

/// Merges the named adapter into the weights of its layers; merging twice is merging once.
pub fn merge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) {
    model.linears_mut(&mut |_, linear| linear.merge(name));
}

/// Undoes [`merge`], up to rounding.
pub fn unmerge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) {
    model.linears_mut(&mut |_, linear| linear.unmerge(name));
}

/// Whether the parameter at `path` belongs to an adapter or a prompt.
pub fn is_adapter(path: &str) -> bool {
    path.split('.').any(|part| part == "adapters" || part == "prompt")
}

fn name_is_free<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Result<(), Error> {
    let mut taken = false;
    model.linears(&mut |_, linear| taken |= linear.adapter(name).is_some());
    if taken {
        return Err(Error::Name { name: name.to_owned(), state: "exists already; choose another name or detach it" });
    }
    Ok(())
}
