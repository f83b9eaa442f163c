//! Another adapter's values in the tensors of one that is on the model.

use super::{Linears, all, parts, several::known};
use crate::{
    Error, LoraConfig, format,
    kernel::{self, LinearKernels},
};
use burn::{
    module::Param,
    tensor::{DType, Tensor, TensorData},
};
use std::path::Path;

/// Reads PEFT's directory of a LoRA adapter into the tensors of the adapter `name`, which takes its place: nothing is allocated
/// that stays, so whatever was compiled or captured for those tensors holds. Returns its configuration and the names of
/// configuration fields that were not understood.
///
/// # Errors
/// If the directory cannot be read, if the model has no LoRA adapter of that name or it is merged, or if the new one has other
/// layers, ranks or parts; then nothing has changed.
pub fn swap<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<(LoraConfig, Vec<String>), Error> {
    known(model, name)?;
    let (config, mut tensors, unknown) = format::read(directory)?;
    let refuse = |state| Error::Name { name: name.to_owned(), state };
    if config.changes_base() {
        return Err(refuse("cannot be swapped for one that changes the base model (bias, modules_to_save, PiSSA)"));
    }
    all(model, |_, linear| match linear.adapter(name).is_some_and(|adapter| adapter.merged) {
        true => Err(refuse("is merged into the weights; unmerge it first")),
        false => Ok(()),
    })?;
    let expected = held(model, name);
    format::fits(directory, &expected, &tensors).map_err(|error| match error {
        Error::Mismatch { path, message } => Error::Swap { path, name: name.to_owned(), message },
        other => other,
    })?;
    let mut take = |path: &str, part: &str| tensors.remove(&format::key(path, part));
    model.linears_mut(&mut |path, linear| {
        for adapter in linear.adapters.iter_mut().filter(|adapter| adapter.name == name) {
            (adapter.scaling, adapter.dropout) = (config.scaling_at(path), config.lora_dropout);
            fill(&mut adapter.lora_a, take(path, "lora_A"));
            fill(&mut adapter.lora_b, take(path, "lora_B"));
            if let Some(dora) = &mut adapter.dora {
                fill(&mut dora.magnitude, take(path, "lora_magnitude_vector"));
            }
        }
    });
    Ok((config, unknown))
}

/// Keys and shapes of the tensors that the adapter has.
fn held<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Vec<(String, Vec<usize>)> {
    let mut held = Vec::new();
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            let (r, use_dora) = (adapter.lora_a.lazy_shape()[0], adapter.dora.is_some());
            let config = LoraConfig { r, use_dora, ..LoraConfig::default() };
            let parts = parts(&config, path, linear.shape()).into_iter();
            held.extend(parts.map(|(part, shape)| (format::key(path, part), shape)));
        }
    });
    held
}

/// Writes `values` into the parameter's own memory, where nobody else holds it.
fn fill<B: LinearKernels, const D: usize>(param: &mut Param<Tensor<B, D>>, values: Option<TensorData>) {
    let Some(values) = values else { return };
    let device = param.lazy_device();
    let new = Tensor::<B, D>::from_data(values, (&device, DType::F32));
    let empty = Param::initialized(param.id, Tensor::zeros([1; D], (&device, DType::F32)));
    let (id, old, mapper) = std::mem::replace(param, empty).consume();
    let trained = old.is_require_grad();
    let filled = B::overwrite(old.into_primitive().tensor(), new.into_primitive().tensor());
    let filled = kernel::tensor::<B, D>(filled).set_require_grad(trained);
    *param = Param::from_mapped_value(id, filled, mapper);
}
