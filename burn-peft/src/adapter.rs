//! Adapters of a whole model: adding, loading, saving, merging, combining and swapping them.

mod base;
mod combine;
mod convert;
mod hotswap;
mod loftq;
mod merge;
mod registry;

pub use base::{is_adapter, train_active, train_only};
pub use combine::{CombinationType, combine, combine_directories};
pub use convert::{convert_mutated_to_lora, save_mutated_as_lora};
pub use hotswap::hotswap;
pub use loftq::{QuantizationResidual, replace_lora_weights_loftq};
pub use merge::{merge, safe_merge, unmerge};
pub use registry::{activate, active, check_adapter_names, check_new_adapter, delete, names};

use crate::{
    Error, Linear, Lora, LoraConfig, Prompt, TargetModules, config::InitLoraWeights, format, lora::Dora,
    target::Selection,
};
use base::TrainableBase;
use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorData},
};
use burn_peft_kernels::LinearKernels;
use std::{collections::BTreeSet, path::Path};

/// A model that exposes its linear layers, each with its path in the checkpoint.
///
/// This is all that adapters need to know about a model.
pub trait Linears<B: LinearKernels> {
    /// Calls `visit` with every linear layer and its path, such as `model.layers.0.self_attn.q_proj`.
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>));

    /// Calls `visit` with every linear layer and its path, for modification.
    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>));

    /// Returns the model's prompts; empty if it has none or does not support them.
    fn prompts(&self) -> &[Prompt<B>] {
        &[]
    }

    /// Returns the model's prompts for modification; `None` if the model does not support prompts.
    fn prompts_mut(&mut self) -> Option<&mut Vec<Prompt<B>>> {
        None
    }

    /// Returns the paths of the embedding and of the output head if they share one weight.
    fn tied(&self) -> Option<[&str; 2]> {
        None
    }

    /// Gives a tied head its own copy of the weight, so that head and embedding can change independently; PEFT trains a
    /// copy as well.
    fn untie(&mut self) {}
}

/// Returns the paths of the linear layers that `config` selects.
///
/// # Errors
/// If nothing is selected, or the configuration is invalid.
pub fn targeted_module_names<B: LinearKernels, M: Linears<B>>(
    model: &M,
    config: &LoraConfig,
) -> Result<Vec<String>, Error> {
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

/// Adds a new adapter to every layer that `config` selects. The model's output does not change yet (unless
/// `init_lora_weights` is `false`). The initial values depend only on `seed`, the layers' paths and, for PiSSA and
/// OLoRA, the weights. `loftq` initializes like `true`, until [`replace_lora_weights_loftq`] is called. This function
/// freezes nothing: see [`train_only`].
///
/// # Errors
/// If nothing is selected, the name is taken, `init_lora_weights` is not supported, or `modules_to_save` names no
/// module of the model.
pub fn attach<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &mut M,
    name: &str,
    config: &LoraConfig,
    seed: u64,
) -> Result<(), Error> {
    if let InitLoraWeights::Other(other) = &config.init_lora_weights {
        let expected = "true, false, gaussian, orthogonal, olora, loftq, pissa or pissa_niter_<n>";
        return Err(Error::config(format!("`init_lora_weights`: expected {expected}, found {other:?}")));
    }
    check_new_adapter(model, name, config.changes_base())?;
    base::untie(model, config)?;
    let base = TrainableBase::new(model, config)?;
    check_layers(model, |path, linear| if base.is_target(path) { linear.check_init(path, config) } else { Ok(()) })?;
    let mut result = Ok(());
    model.linears_mut(&mut |path, linear| {
        if base.is_target(path) && result.is_ok() {
            result = linear.attach(path, name, config, seed);
        }
    });
    base.cast_to_f32(model);
    result
}

/// Returns the names and shapes of the tensors of one layer's adapter.
fn lora_tensor_shapes(config: &LoraConfig, path: &str, [out, features]: [usize; 2]) -> Vec<(&'static str, Vec<usize>)> {
    let r = config.rank_at(path);
    let mut parts = vec![("lora_A", vec![r, features]), ("lora_B", vec![out, r])];
    if config.use_dora {
        parts.push(("lora_magnitude_vector", vec![out]));
    }
    parts
}

/// Reads a PEFT adapter directory and adds the adapter to the model as `name`. Returns its configuration and the names
/// of unknown configuration fields. Biases and modules that were trained along with the adapter (`bias`,
/// `modules_to_save`) replace those of the model.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<(LoraConfig, Vec<String>), Error> {
    let (config, mut tensors, unknown) = format::read(directory)?;
    check_new_adapter(model, name, config.changes_base())?;
    base::untie(model, &config)?;
    let base = TrainableBase::new(model, &config)?;
    let mut expected = base.expected_tensors();
    model.linears(&mut |path, linear| {
        if base.is_target(path) {
            let parts = lora_tensor_shapes(&config, path, linear.shape()).into_iter();
            expected.extend(parts.map(|(part, shape)| (format::tensor_key(path, part), shape)));
            // PEFT also writes the base weight of an adapted output head.
            let own = format::tensor_key(path, "base_layer");
            expected.extend(tensors.contains_key(&own).then(|| (own, linear.shape().to_vec())));
        }
    });
    format::check_tensors(directory, &expected, &tensors)?;
    check_layers(model, |path, linear| if base.is_target(path) { linear.check_init(path, &config) } else { Ok(()) })?;
    let mut result = Ok(());
    let mut take = |path: &str, part: &str| tensors.remove(&format::tensor_key(path, part));
    model.linears_mut(&mut |path, linear| {
        if base.is_target(path)
            && let (Some(a), Some(b)) = (take(path, "lora_A"), take(path, "lora_B"))
        {
            let device = linear.weight.device();
            if let Some(own) = take(path, "base_layer") {
                linear.map_weight(|_| Tensor::from_data(own, (&device, DType::F32)));
            }
            if config.init_lora_weights.mutates_base_weights() {
                // The adapter was trained on the weight minus its initial `s·B·A`; attaching a new one subtracts that.
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
    base.load_tensors(model, &tensors);
    Ok((config, unknown))
}

/// Writes the named adapter as a PEFT directory, with the biases and modules that were trained along with it.
///
/// # Errors
/// If the model has no such adapter or the directory cannot be written.
pub fn save<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
    config: &LoraConfig,
    directory: &Path,
) -> Result<(), Error> {
    let (tensors, config) = collect_state_dict(model, name, config)?;
    format::write(directory, &config.to_json(), tensors)
}

/// Returns the adapter's tensors by their keys in PEFT's file, and its configuration as PEFT writes it.
fn collect_state_dict<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
    config: &LoraConfig,
) -> Result<(Vec<(String, TensorData)>, LoraConfig), Error> {
    let (mut tensors, mut targets) = (Vec::new(), BTreeSet::new());
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            tensors.push((format::tensor_key(path, "lora_A"), adapter.lora_a.val().into_data()));
            tensors.push((format::tensor_key(path, "lora_B"), adapter.lora_b.val().into_data()));
            if let Some(dora) = &adapter.dora {
                tensors.push((format::tensor_key(path, "lora_magnitude_vector"), dora.magnitude.val().into_data()));
            }
            targets.insert(path.rsplit('.').next().unwrap_or(path).to_owned());
        }
    });
    if tensors.is_empty() {
        return Err(Error::InvalidAdapter { name: name.to_owned(), state: "is on no layer of the model" });
    }
    tensors.extend(TrainableBase::new(model, config)?.state_dict(model));
    let mut config = config.clone();
    // Like PEFT, write a wildcard as the list of module names that it matched.
    if matches!(&config.target_modules, TargetModules::Pattern(p) if p == "all-linear") {
        config.target_modules = TargetModules::Suffixes(targets.into_iter().collect());
    }
    Ok((tensors, config))
}

/// Runs `check` on every linear layer and returns the first error.
fn check_layers<B: LinearKernels, M: Linears<B>>(
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
