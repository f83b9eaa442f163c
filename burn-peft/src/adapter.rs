//! Adapters on a whole model: attach, read, write, merge.

mod base;
mod combine;
mod convert;
mod loftq;
mod merge;
mod several;
mod swap;

pub use base::{is_adapter, train_active, train_only};
pub use combine::{Combination, combine, combine_directories};
pub use convert::{convert_to_lora, save_as_lora};
pub use loftq::{Rounding, replace_lora_weights_loftq};
pub use merge::{merge, safe_merge, unmerge};
pub use several::{activate, active, admit, check_rows, delete, names};
pub use swap::swap;

use crate::{
    Error, Linear, Lora, LoraConfig, Prompt, TargetModules, config::InitLora, format, kernel::LinearKernels,
    lora::Dora, target::Selection,
};
use base::Base;
use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorData},
};
use std::{collections::BTreeSet, path::Path};

/// A model that shows its linear layers, each with its path in the checkpoint.
///
/// This is all that adapters need to know of a model.
pub trait Linears<B: LinearKernels> {
    /// Calls `visit` with every linear layer and its path, such as `model.layers.0.self_attn.q_proj`.
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>));

    /// As [`Linears::linears`], for changing them.
    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>));

    /// The model's prompts, if it can have any.
    fn prompts(&self) -> &[Prompt<B>] {
        &[]
    }

    /// As [`Linears::prompts`], for changing them; `None` if the model can have none.
    fn prompts_mut(&mut self) -> Option<&mut Vec<Prompt<B>>> {
        None
    }

    /// The paths of the embedding and of the head if they are one weight.
    fn tied(&self) -> Option<[&str; 2]> {
        None
    }

    /// Gives a tied head a weight of its own, with the same values, so that one of the two can change: PEFT, too, trains a copy.
    fn untie(&mut self) {}
}

/// The paths that `config` selects.
///
/// # Errors
/// If nothing is selected, or the configuration is not possible.
pub fn targets<B: LinearKernels, M: Linears<B>>(model: &M, config: &LoraConfig) -> Result<Vec<String>, Error> {
    config.check()?;
    let (selection, mut selected, mut names) = (Selection::new(config)?, Vec::new(), BTreeSet::new());
    model.linears(&mut |path, _| {
        if selection.selects(path) {
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

/// Adds a new adapter to every layer that `config` selects. It changes nothing yet (unless `init_lora_weights` is `false`), and its
/// start depends on `seed`, the layers' paths and, for a start from the weight, the weights only. `loftq` starts as `true` does,
/// until [`replace_lora_weights_loftq`]. Nothing is frozen here: see [`train_only`].
///
/// # Errors
/// If nothing is selected, the name is taken, the start is none of ours, or `modules_to_save` names no module of the model.
pub fn attach<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &mut M,
    name: &str,
    config: &LoraConfig,
    seed: u64,
) -> Result<(), Error> {
    if let InitLora::Other(other) = &config.init_lora_weights {
        let expected = "true, false, gaussian, orthogonal, olora, loftq, pissa or pissa_niter_<n>";
        return Err(Error::config(format!("`init_lora_weights`: expected {expected}, found {other:?}")));
    }
    admit(model, name, config.changes_base())?;
    base::untie(model, config)?;
    let base = Base::new(model, config)?;
    all(model, |path, linear| if base.adapted(path) { linear.fits(path, config) } else { Ok(()) })?;
    let mut result = Ok(());
    model.linears_mut(&mut |path, linear| {
        if base.adapted(path) && result.is_ok() {
            result = linear.attach(path, name, config, seed);
        }
    });
    base.widen(model);
    result
}

/// Names and shapes of the parts of one layer's adapter.
fn parts(config: &LoraConfig, path: &str, [out, features]: [usize; 2]) -> Vec<(&'static str, Vec<usize>)> {
    let r = config.rank_at(path);
    let mut parts = vec![("lora_A", vec![r, features]), ("lora_B", vec![out, r])];
    if config.use_dora {
        parts.push(("lora_magnitude_vector", vec![out]));
    }
    parts
}

/// Reads PEFT's adapter directory and adds it to the model under `name`. Returns its configuration and the names of
/// configuration fields that were not understood. Biases and whole modules that were trained beside the adapter replace the
/// model's.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<(LoraConfig, Vec<String>), Error> {
    let (config, mut tensors, unknown) = format::read(directory)?;
    admit(model, name, config.changes_base())?;
    base::untie(model, &config)?;
    let base = Base::new(model, &config)?;
    let mut expected = base.expected();
    model.linears(&mut |path, linear| {
        if base.adapted(path) {
            let parts = parts(&config, path, linear.shape()).into_iter();
            expected.extend(parts.map(|(part, shape)| (format::key(path, part), shape)));
            // PEFT writes the weight of a head beside its adapter.
            let own = format::key(path, "base_layer");
            expected.extend(tensors.contains_key(&own).then(|| (own, linear.shape().to_vec())));
        }
    });
    format::fits(directory, &expected, &tensors)?;
    all(model, |path, linear| if base.adapted(path) { linear.fits(path, &config) } else { Ok(()) })?;
    let mut result = Ok(());
    let mut take = |path: &str, part: &str| tensors.remove(&format::key(path, part));
    model.linears_mut(&mut |path, linear| {
        if base.adapted(path)
            && let (Some(a), Some(b)) = (take(path, "lora_A"), take(path, "lora_B"))
        {
            let device = linear.weight.device();
            if let Some(own) = take(path, "base_layer") {
                linear.map_weight(|_| Tensor::from_data(own, (&device, DType::F32)));
            }
            if config.init_lora_weights.splits_weight() {
                // The adapter is one of what the start left of the weight.
                result = linear.attach(path, name, &config, 0);
                linear.adapters.pop();
            }
            let tensor = |data: TensorData| Tensor::<B, 2>::from_data(data, (&device, DType::F32));
            let mut adapter = Lora::from_tensors(path, name, &config, tensor(a), tensor(b));
            let magnitude = take(path, "lora_magnitude_vector");
            adapter.dora = magnitude.map(|data| Dora::new(path, name, Tensor::from_data(data, (&device, DType::F32))));
            linear.adapters.push(adapter);
        }
    });
    result?;
    base.replace(model, &tensors);
    Ok((config, unknown))
}

/// Writes the named adapter as PEFT's directory, with the biases and modules that were trained beside it.
///
/// # Errors
/// If the model has no such adapter or the directory cannot be written.
pub fn save<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
    config: &LoraConfig,
    directory: &Path,
) -> Result<(), Error> {
    let (tensors, config) = collect(model, name, config)?;
    format::write(directory, &config.to_json(), tensors)
}

/// The adapter's tensors by key, and its configuration as PEFT writes it.
fn collect<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
    config: &LoraConfig,
) -> Result<(Vec<(String, TensorData)>, LoraConfig), Error> {
    let (mut tensors, mut targets) = (Vec::new(), BTreeSet::new());
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            tensors.push((format::key(path, "lora_A"), adapter.lora_a.val().into_data()));
            tensors.push((format::key(path, "lora_B"), adapter.lora_b.val().into_data()));
            if let Some(dora) = &adapter.dora {
                tensors.push((format::key(path, "lora_magnitude_vector"), dora.magnitude.val().into_data()));
            }
            targets.insert(path.rsplit('.').next().unwrap_or(path).to_owned());
        }
    });
    if tensors.is_empty() {
        return Err(Error::Name { name: name.to_owned(), state: "is on no layer of the model" });
    }
    tensors.extend(Base::new(model, config)?.tensors(model));
    let mut config = config.clone();
    // As PEFT does: a wildcard is written as the names that it stood for.
    if matches!(&config.target_modules, TargetModules::Pattern(p) if p == "all-linear") {
        config.target_modules = TargetModules::Suffixes(targets.into_iter().collect());
    }
    Ok((tensors, config))
}

/// The first error that `check` finds on a layer.
fn all<B: LinearKernels, M: Linears<B>>(
    model: &M,
    check: impl Fn(&str, &Linear<B>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut result = Ok(());
    model.linears(&mut |path, linear| {
        if result.is_ok() {
            result = check(path, linear);
        }
    });
    result
}
