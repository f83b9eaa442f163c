//! Reads and writes prompts as PEFT directories, which hold a single tensor, `prompt_embeddings`.

use super::{BaseShape, Prompt, PromptConfig, PromptEncoder, PromptMethod};
use crate::{Error, Loaded, Weight, format};
use burn::{
    module::Param,
    tensor::{DType, Tensor, TensorData},
};
use burn_peft_kernels::LinearKernels;
use std::{collections::BTreeMap, path::Path};

const EMBEDDINGS_KEY: &str = "prompt_embeddings";

impl<B: LinearKernels> Prompt<B> {
    /// Reads a prompt from a PEFT directory, for a base model of the given sizes.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the prompt was trained on a base model of other sizes.
    pub fn load(directory: &Path, base: BaseShape, device: &B::Device) -> Result<Loaded<Self>, Error> {
        let path = directory.join(format::CONFIG_NAME);
        let json = format::read_config(directory)?;
        let layers = json["num_layers"].as_u64().map(|n| n as usize);
        let Loaded { value: config, unknown_fields } = PromptConfig::from_json(&path, json)?;
        let mut tensors = format::read_tensors(directory)?;
        let expected = [config.num_virtual_tokens, config.width(&base)];
        let mut problems = Vec::new();
        if let Some(found) = layers.filter(|&found| found != base.num_hidden_layers) {
            problems.push(format!("num_layers: expected {}, found {found}", base.num_hidden_layers));
        }
        let table = tensors.remove(EMBEDDINGS_KEY);
        match &table {
            Some(table) if table.shape.as_slice() == expected => {}
            Some(table) => {
                problems.push(format!("{EMBEDDINGS_KEY}: expected {expected:?}, found {:?}", table.shape.as_slice()))
            }
            None => problems.push(format!("{EMBEDDINGS_KEY} is missing")),
        }
        problems.extend(tensors.into_keys().map(|key| format!("{key} does not belong to a prompt")));
        match table {
            Some(table) if problems.is_empty() => {
                let encoder = PromptEncoder::from_embeddings(Tensor::from_data(table, (device, DType::F32)));
                Ok(Loaded { value: Self::from_encoder(encoder, config, base), unknown_fields })
            }
            _ => Err(Error::Mismatch { path: directory.to_owned(), message: problems.join("; ") }),
        }
    }

    /// Writes the prompt as a PEFT directory, which stores the output of the encoder.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        let table = self.encoder.forward().into_data();
        format::write(directory, &self.config.to_json(&self.base), vec![(EMBEDDINGS_KEY.to_owned(), table)])
    }

    /// Loads the embedding table and MLP of PEFT's encoder from a safetensors file with the keys of its `state_dict`:
    /// `embedding.weight` and `transform.0.weight` … or `mlp_head.0.weight` … (PEFT itself saves only the output). A rank
    /// that does not hold the encoder keeps its placeholders.
    ///
    /// # Errors
    /// If a tensor is missing or has a different shape.
    pub fn read_encoder(&mut self, file: &Path) -> Result<(), Error> {
        let tensors = format::read_file(file)?;
        if self.elsewhere {
            return Ok(());
        }
        let device = self.encoder.embedding.lazy_device();
        let name = if matches!(self.config.method, PromptMethod::Prefix { .. }) { "transform" } else { "mlp_head" };
        let encoder = &mut self.encoder;
        load_param(&mut encoder.embedding, &tensors, "embedding.weight", file, &device)?;
        for (index, layer) in encoder.layers.iter_mut().enumerate() {
            let key = |part: &str| format!("{name}.{}.{part}", 2 * index);
            if let Weight::Dense(weight) = &mut layer.weight {
                load_param(weight, &tensors, &key("weight"), file, &device)?;
            }
            if let Some(bias) = &mut layer.bias {
                load_param(bias, &tensors, &key("bias"), file, &device)?;
            }
        }
        Ok(())
    }
}

fn load_param<B: LinearKernels, const D: usize>(
    param: &mut Param<Tensor<B, D>>,
    tensors: &BTreeMap<String, TensorData>,
    key: &str,
    file: &Path,
    device: &B::Device,
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
