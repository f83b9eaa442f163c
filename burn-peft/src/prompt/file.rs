//! A prompt as PEFT's directory: one tensor, `prompt_embeddings`.

use super::{BaseShape, Encoder, Method, Prompt, PromptConfig};
use crate::{Error, Weight, format, kernel::LinearKernels};
use burn::{
    module::Param,
    tensor::{DType, Tensor, TensorData},
};
use std::{collections::BTreeMap, path::Path};

const KEY: &str = "prompt_embeddings";

impl<B: LinearKernels> Prompt<B> {
    /// Reads PEFT's adapter directory of a prompt for the base model of the given shape. Also returned are the configuration
    /// fields that are not known here, which the caller should warn about.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the prompt was trained on another base model.
    pub fn load(directory: &Path, base: BaseShape, device: &B::Device) -> Result<(Self, Vec<String>), Error> {
        let path = directory.join(format::CONFIG);
        let json = format::read_config(directory)?;
        let layers = json["num_layers"].as_u64().map(|n| n as usize);
        let (config, unknown) = PromptConfig::from_json(&path, json)?;
        let mut tensors = format::read_tensors(directory)?;
        let expected = [config.num_virtual_tokens, config.width(&base)];
        let mut problems = Vec::new();
        if let Some(found) = layers.filter(|&found| found != base.num_hidden_layers) {
            problems.push(format!("num_layers: expected {}, found {found}", base.num_hidden_layers));
        }
        let table = tensors.remove(KEY);
        match &table {
            Some(table) if table.shape.as_slice() == expected => {}
            Some(table) => problems.push(format!("{KEY}: expected {expected:?}, found {:?}", table.shape.as_slice())),
            None => problems.push(format!("{KEY} is missing")),
        }
        problems.extend(tensors.into_keys().map(|key| format!("{key} is no part of a prompt")));
        match table {
            Some(table) if problems.is_empty() => {
                let encoder = Encoder::flat(Tensor::from_data(table, (device, DType::F32)));
                Ok((Self::with(encoder, config, base), unknown))
            }
            _ => Err(Error::Mismatch { path: directory.to_owned(), message: problems.join("; ") }),
        }
    }

    /// Writes PEFT's adapter directory. The encoder's output is what is stored.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        let table = self.encoder.forward().into_data();
        format::write(directory, &self.config.to_json(&self.base), vec![(KEY.to_owned(), table)])
    }

    /// Takes the state of PEFT's encoder, table and MLP, from a safetensors file with the keys of its `state_dict`:
    /// `embedding.weight` and `transform.0.weight` … or `mlp_head.0.weight` … (PEFT itself saves the output only).
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn read_encoder(&mut self, file: &Path) -> Result<(), Error> {
        let tensors = format::read_file(file)?;
        let device = self.encoder.embedding.lazy_device();
        let name = if matches!(self.config.method, Method::Prefix { .. }) { "transform" } else { "mlp_head" };
        let encoder = &mut self.encoder;
        take(&mut encoder.embedding, &tensors, "embedding.weight", (file, &device))?;
        for (index, layer) in encoder.layers.iter_mut().enumerate() {
            let key = |part: &str| format!("{name}.{}.{part}", 2 * index);
            if let Weight::Dense(weight) = &mut layer.weight {
                take(weight, &tensors, &key("weight"), (file, &device))?;
            }
            if let Some(bias) = &mut layer.bias {
                take(bias, &tensors, &key("bias"), (file, &device))?;
            }
        }
        Ok(())
    }
}

fn take<B: LinearKernels, const D: usize>(
    param: &mut Param<Tensor<B, D>>,
    tensors: &BTreeMap<String, TensorData>,
    key: &str,
    (file, device): (&Path, &B::Device),
) -> Result<(), Error> {
    let expected = param.lazy_shape().to_vec();
    let found = tensors.get(key).ok_or_else(|| Error::format(file, key, format!("{expected:?}"), "no such tensor"))?;
    if found.shape.as_slice() != expected {
        return Err(Error::format(file, key, format!("{expected:?}"), format!("{:?}", found.shape.as_slice())));
    }
    let value = Tensor::from_data(found.clone(), (device, DType::F32));
    *param = param.clone().map(|old| value.set_require_grad(old.is_require_grad()));
    Ok(())
}
