//! IA3 adapters of a whole model: adding, loading and saving them.

use super::{
    linears::{Linears, select_layers},
    registry::check_new_adapter,
};
use crate::{Error, Ia3, Ia3Config, Linear, Loaded, TargetModules, format};
use burn::tensor::{DType, Tensor};
use burn_peft_kernels::LinearKernels;
use std::{path::Path, sync::Arc};

/// The path of a selected layer and the shape of its factors.
struct Ia3Layer {
    path: String,
    factors: [usize; 2],
}

/// Returns the layers that `config` selects. Unties the output head if it is selected.
fn target_layers<B: LinearKernels, M: Linears<B>>(model: &mut M, config: &Ia3Config) -> Result<Vec<Ia3Layer>, Error> {
    let (target, feedforward) = (config.target_modules.matcher()?, config.feedforward_modules.matcher()?);
    let exclude = config.exclude_modules.as_ref().map(TargetModules::matcher).transpose()?;
    let selects = |path: &str| target.selects(path) && !exclude.as_ref().is_some_and(|exclude| exclude.selects(path));
    if model.tied().is_some_and(|[_, head]| selects(head)) {
        model.untie();
    }
    let selected = select_layers(model, &config.target_modules, selects)?.into_iter().map(|layer| {
        let [out, features] = layer.shape;
        let factors = if feedforward.selects(&layer.path) { [1, features] } else { [out, 1] };
        Ia3Layer { path: layer.path, factors }
    });
    Ok(selected.collect())
}

/// Returns PEFT's key for the factors of the layer at `path`.
fn tensor_key(path: &str) -> String {
    format!("base_model.model.{path}.ia3_l")
}

/// Adds an adapter to the selected layers; `factors` makes its values for a layer's path and shape.
fn inject<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    config: &Arc<Ia3Config>,
    selected: Vec<Ia3Layer>,
    mut factors: impl FnMut(&str, [usize; 2], &B::Device) -> Tensor<B, 2>,
) {
    let mut selected = selected.into_iter().peekable();
    model.linears_mut(&mut |path, linear: &mut Linear<B>| {
        if let Some(layer) = selected.next_if(|layer| layer.path == path) {
            let device = linear.weight.device();
            let shape = if linear.is_elsewhere() { None } else { Some(layer.factors) };
            let values = match shape {
                Some(shape) => factors(path, shape, &device),
                None => Tensor::ones([1, 1], (&device, DType::F32)),
            };
            linear.ia3.push(Ia3::new(path, name, config, values));
        }
    });
}

/// Adds IA3 factors of 1 to every layer that `config` selects: they change nothing yet.
///
/// # Errors
/// If nothing is selected, the name is taken, or the configuration asks for random factors.
pub fn attach_ia3<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str, config: &Ia3Config) -> Result<(), Error> {
    if !config.init_ia3_weights {
        return Err(Error::config("`init_ia3_weights` should be true: initial factors other than 1 break the model"));
    }
    check_new_adapter(model, name, false)?;
    let selected = target_layers(model, config)?;
    inject(model, name, &Arc::new(config.clone()), selected, |_, shape, device| {
        Tensor::ones(shape, (device, DType::F32))
    });
    Ok(())
}

/// Reads an IA3 adapter from a PEFT directory and adds it to the model as `name`. Returns its configuration.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load_ia3<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<Loaded<Ia3Config>, Error> {
    let path = directory.join(format::CONFIG_NAME);
    let Loaded { value: config, unknown_fields } = Ia3Config::from_json(&path, format::read_config(directory)?)?;
    let tensors = format::read_tensors(directory)?;
    check_new_adapter(model, name, false)?;
    let selected = target_layers(model, &config)?;
    let expected: Vec<_> = selected.iter().map(|layer| (tensor_key(&layer.path), layer.factors.to_vec())).collect();
    let mut tensors = format::align_tensors(tensors, expected.iter().map(|(key, _)| key.clone()));
    format::check_tensors(directory, &expected, &tensors)?;
    inject(model, name, &Arc::new(config.clone()), selected, |path, shape, device| {
        match tensors.remove(&tensor_key(path)) {
            Some(data) => Tensor::from_data(data, (device, DType::F32)),
            None => Tensor::ones(shape, (device, DType::F32)),
        }
    });
    Ok(Loaded { value: config, unknown_fields })
}

/// Writes the named IA3 adapter of the given configuration as a PEFT directory.
pub(super) fn save_ia3<B: LinearKernels, M: Linears<B>>(
    model: &M,
    name: &str,
    config: &Ia3Config,
    directory: &Path,
) -> Result<(), Error> {
    let mut tensors = Vec::new();
    model.linears(&mut |path, linear| {
        let named = linear.ia3.iter().find(|ia3| ia3.name == name);
        tensors.extend(named.map(|ia3| (tensor_key(path), ia3.ia3_l.val().into_data())));
    });
    format::write(directory, &config.to_json(), tensors)
}
