//! Hot swap: loads another adapter's values into the tensors of an adapter that is on the model.

use super::{
    linears::{Linears, check_layers},
    lora::lora_tensor_shapes,
    registry::check_exists,
};
use crate::{
    Error, Loaded, LoraConfig,
    error::MERGED,
    format::{self, AdapterFiles},
};
use burn::{
    module::Param,
    tensor::{DType, Tensor, TensorData, TensorPrimitive},
};
use burn_peft_kernels::LinearKernels;
use std::{path::Path, sync::Arc};

/// Loads a LoRA adapter from a PEFT directory into the tensors of the adapter `name`, which it replaces: PEFT's
/// `hotswap_adapter`. The tensors keep their memory, so code that was compiled or captured for them remains valid.
/// Returns the new adapter's configuration.
///
/// # Errors
/// If the directory cannot be read, if the model has no LoRA adapter of that name or it is merged, or if the new one
/// has other layers, ranks or tensors; the model is then unchanged.
pub fn hotswap<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<Loaded<LoraConfig>, Error> {
    check_exists(model, name)?;
    let AdapterFiles { config, mut tensors, unknown_fields } = format::read(directory)?;
    let on_embedding = model.embedding().is_some_and(|(_, embedding)| embedding.adapter(name).is_some());
    if config.changes_base() || on_embedding || config.trainable_token_indices.is_some() {
        return Err(Error::adapter(
            name,
            "cannot be swapped for one that changes the base model (bias, modules_to_save, PiSSA), nor may either act on the \
             embedding",
        ));
    }
    check_layers(model, |_, linear| match linear.adapter(name) {
        Some(adapter) if adapter.merged => Err(Error::adapter(name, MERGED)),
        Some(adapter) if adapter.adalora.is_some() => {
            Err(Error::adapter(name, "is trained with AdaLoRA and cannot be swapped"))
        }
        _ => Ok(()),
    })?;
    let expected = expected_tensors(model, name);
    format::check_tensors(directory, &expected, &tensors).map_err(|error| match error {
        Error::Mismatch { path, message } => Error::Hotswap { path, name: name.to_owned(), message },
        other => other,
    })?;
    let shared = Arc::new(config.clone());
    let mut take = |path: &str, part: &str| tensors.remove(&format::tensor_key(path, part));
    model.linears_mut(&mut |path, linear| {
        for adapter in linear.adapters.iter_mut().filter(|adapter| adapter.name == name) {
            (adapter.scaling, adapter.config) = (config.scaling_at(path), Arc::clone(&shared));
            overwrite_param(&mut adapter.lora_a, take(path, "lora_A"));
            overwrite_param(&mut adapter.lora_b, take(path, "lora_B"));
            if let Some(dora) = &mut adapter.dora {
                overwrite_param(&mut dora.magnitude, take(path, "lora_magnitude_vector"));
            }
        }
    });
    Ok(Loaded { value: config, unknown_fields })
}

/// Returns the keys and shapes of the adapter's tensors.
fn expected_tensors<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Vec<(String, Vec<usize>)> {
    let mut held = Vec::new();
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            let (r, use_dora) = (adapter.lora_a.lazy_shape()[0], adapter.dora.is_some());
            let config = LoraConfig { r, use_dora, ..LoraConfig::default() };
            let parts = lora_tensor_shapes(&config, path, linear.shape()).into_iter();
            held.extend(parts.map(|(part, shape)| (format::tensor_key(path, part), shape)));
        }
    });
    held
}

/// Writes `values` into the parameter's own memory if nothing else shares it, else into new memory.
fn overwrite_param<B: LinearKernels, const D: usize>(param: &mut Param<Tensor<B, D>>, values: Option<TensorData>) {
    let Some(values) = values else { return };
    let device = param.lazy_device();
    let new = Tensor::<B, D>::from_data(values, (&device, DType::F32));
    let empty = Param::initialized(param.id, Tensor::zeros([1; D], (&device, DType::F32)));
    let (id, old, mapper) = std::mem::replace(param, empty).consume();
    let trained = old.is_require_grad();
    let filled = B::overwrite(old.into_primitive().tensor(), new.into_primitive().tensor());
    let filled = Tensor::<B, D>::from_primitive(TensorPrimitive::Float(filled)).set_require_grad(trained);
    *param = Param::from_mapped_value(id, filled, mapper);
}
