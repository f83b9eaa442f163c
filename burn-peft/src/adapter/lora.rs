//! LoRA adapters of a whole model: adding, loading and saving them.

use super::{
    base::{self, TrainableBase},
    embedding::{EmbeddingTarget, collect_tensors},
    freeze::train_active,
    linears::{Linears, check_layers},
    registry::check_new_adapter,
    saved_embeddings::{self, SavedEmbeddings},
};
use crate::{
    Error, Linear, Loaded, Lora, LoraConfig, TargetModules,
    config::InitLoraWeights,
    format::{self, AdapterFiles},
    lora::{AdaLora, Dora, LoraSpec},
    param::last_segment,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, TensorData},
};
use burn_peft_kernels::LinearKernels;
use serde_json::{Map, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Adds a new adapter to every layer that `config` selects. The model's output does not change yet (unless
/// `init_lora_weights` is `false`). The initial values depend only on `seed`, the layers' paths and, for PiSSA and
/// OLoRA, the weights. `loftq` initializes like `true`, until
/// [`replace_lora_weights_loftq`](super::replace_lora_weights_loftq) is called. This function freezes nothing: see
/// [`attach_and_freeze`] and [`train_active`].
///
/// # Errors
/// If nothing is selected, the name is taken, `init_lora_weights` is not supported, `modules_to_save` names no module
/// of the model, or `trainable_token_indices` has a token that the model does not know.
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
    let (base, embedding) = (TrainableBase::new(model, config)?, EmbeddingTarget::new(model, config)?);
    if embedding.is_some() && config.adalora.is_some() {
        return Err(Error::config("`target_modules`: expected linear layers only with AdaLoRA, found the embedding"));
    }
    check_layers(model, |path, linear| if base.is_target(path) { linear.check_init(path, config) } else { Ok(()) })?;
    embedding.as_ref().map_or(Ok(()), EmbeddingTarget::check_tokens)?;
    let mut result = Ok(());
    model.linears_mut(&mut |path, linear| {
        if base.is_target(path) && result.is_ok() {
            result = linear.attach(path, name, config, seed);
        }
    });
    if let Some(embedding) = embedding {
        embedding.attach(model, name, config, seed);
    }
    base.cast_to_f32(model);
    result
}

/// Adds a new adapter as [`attach`] does with the seed 0, and makes only the active adapters and what is trained along
/// with them trainable, see [`train_active`].
///
/// # Errors
/// As for [`attach`].
pub fn attach_and_freeze<B: LinearKernels, M: Linears<B> + Module<B>>(
    mut model: M,
    name: &str,
    config: &LoraConfig,
) -> Result<M, Error> {
    attach(&mut model, name, config, 0)?;
    train_active(model)
}

/// Returns the names and shapes of the tensors of one layer's adapter.
pub(super) fn lora_tensor_shapes(
    config: &LoraConfig,
    path: &str,
    [out, features]: [usize; 2],
) -> Vec<(&'static str, Vec<usize>)> {
    let r = config.rank_at(path);
    let mut parts = vec![("lora_A", vec![r, features]), ("lora_B", vec![out, r])];
    if config.use_dora {
        parts.push(("lora_magnitude_vector", vec![out]));
    }
    parts
}

/// Reads the directory of a LoRA or AdaLoRA adapter of PEFT and adds the adapter to the model as `name`. Returns its
/// configuration, that of plain LoRA for AdaLoRA. Biases and modules that were trained along with the adapter (`bias`,
/// `modules_to_save`) replace those of the model, and so do an embedding and an output head in the file: a model with
/// fewer rows grows. It also grows if `trainable_token_indices` continues its tokens.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<Loaded<LoraConfig>, Error> {
    let AdapterFiles { mut config, tensors, unknown_fields } = format::read(directory)?;
    check_new_adapter(model, name, config.changes_base())?;
    base::untie(model, &config)?;
    let mut tensors = format::align_tensors(tensors, known_names(model, &config)?.into_iter());
    saved_embeddings::prepare_modules_to_save(model, &config, &mut tensors)?;
    let saved = SavedEmbeddings::take(model, &config, directory, &mut tensors)?;
    saved.check_new_adapter(model, name)?;
    let has_head = saved.has_head();
    config.save_embedding_layers = saved.install(model);
    let mut embedding = EmbeddingTarget::new(model, &config)?;
    if let Some(embedding) = &mut embedding {
        embedding.grow(model);
        embedding.check_tokens()?;
        embedding.take_tied(model, directory, &mut tensors)?;
    }
    let base = TrainableBase::new(model, &config)?;
    let expected = expected_tensors(model, &config, &base, &tensors)?;
    format::check_tensors(directory, &expected, &tensors)?;
    check_layers(model, |path, linear| {
        if base.is_target(path) && !linear.is_elsewhere() { linear.check_init(path, &config) } else { Ok(()) }
    })?;
    let mut result = Ok(());
    model.linears_mut(&mut |path, linear| {
        if base.is_target(path) && result.is_ok() {
            let installed = has_head && path == saved_embeddings::HEAD;
            result = load_layer(linear, LoraSpec { path, name, config: &config }, installed, &mut tensors);
        }
    });
    result?;
    if let Some(embedding) = embedding {
        embedding.load(model, name, &config, &mut tensors);
    }
    base.load_tensors(model, &tensors);
    Ok(Loaded { value: config, unknown_fields })
}

/// Returns the keys and shapes of the tensors that the adapter's file has to contain, without the embedding and the
/// head of the base model. Those of single layers are expected if they are in the file.
fn expected_tensors<B: LinearKernels, M: Linears<B>>(
    model: &M,
    config: &LoraConfig,
    base: &TrainableBase,
    found: &BTreeMap<String, TensorData>,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let mut expected = base.expected_tensors();
    model.linears(&mut |path, linear| {
        if base.is_target(path) {
            let parts = lora_tensor_shapes(config, path, linear.shape()).into_iter();
            expected.extend(parts.map(|(part, shape)| (format::tensor_key(path, part), shape)));
            let own = format::tensor_key(path, "base_layer");
            expected.extend(found.contains_key(&own).then(|| (own, linear.shape().to_vec())));
        }
    });
    expected.extend(EmbeddingTarget::new(model, config)?.iter().flat_map(|target| target.expected_tensors(config)));
    Ok(expected)
}

/// Returns every name that a tensor of the adapter may have.
fn known_names<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    config: &LoraConfig,
) -> Result<Vec<String>, Error> {
    let expected = expected_tensors(model, config, &TrainableBase::new(model, config)?, &BTreeMap::new())?;
    let mut names: Vec<String> = expected.into_iter().map(|(name, _)| name).collect();
    let paths = saved_embeddings::paths(model, config)?;
    names.extend(paths.iter().flatten().flat_map(|path| saved_embeddings::names(path)));
    Ok(names)
}

/// Adds the adapter of one layer, whose values it takes out of `tensors`. The weight of the layer is in the file as well if
/// it is `installed` already.
fn load_layer<B: LinearKernels>(
    linear: &mut Linear<B>,
    spec: LoraSpec<'_>,
    installed: bool,
    tensors: &mut BTreeMap<String, TensorData>,
) -> Result<(), Error> {
    let LoraSpec { path, name, config } = spec;
    let mut take = |part: &str| tensors.remove(&format::tensor_key(path, part));
    let (Some(a), Some(b)) = (take("lora_A"), take("lora_B")) else { return Ok(()) };
    let device = linear.weight.device();
    if linear.is_elsewhere() {
        linear.adapters.push(Lora::placeholder(spec, &device));
        return Ok(());
    }
    let own = take("base_layer");
    let in_file = installed || own.is_some();
    if let Some(own) = own {
        linear.map_weight(|_| Tensor::from_data(own, (&device, DType::F32)));
    }
    // A weight in the file is changed already.
    if config.init_lora_weights.mutates_base_weights() && !in_file {
        // The adapter was trained on the weight minus its initial `s·B·A`; attaching a new one subtracts that.
        linear.attach(path, name, config, 0)?;
        linear.adapters.pop();
    }
    let tensor = |data: TensorData| Tensor::<B, 2>::from_data(data, (&device, DType::F32));
    let mut adapter = Lora::from_tensors(spec, tensor(a), tensor(b));
    let magnitude = take("lora_magnitude_vector");
    adapter.dora = magnitude.map(|data| Dora::new(path, name, Tensor::from_data(data, (&device, DType::F32))));
    linear.adapters.push(adapter);
    Ok(())
}

/// Returns the content of a LoRA adapter's directory as PEFT writes it, with the biases and modules that were trained
/// along with it.
pub(super) fn collect_state_dict<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
) -> Result<AdapterFiles, Error> {
    let (mut tensors, mut targets, mut config) = (BTreeMap::new(), BTreeSet::new(), None);
    let mut kept = Map::new();
    model.linears(&mut |path, linear| {
        if let Some(adapter) = linear.adapter(name) {
            let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(Param::val);
            match &adapter.adalora {
                Some(adalora) => {
                    kept.extend(adalora.kept.iter().map(|kept| (format!("{path}.lora_E"), json!(kept))));
                    tensors.extend(adalora_tensors(adalora, [a, b], path));
                }
                None => tensors.extend(
                    [("lora_A", a), ("lora_B", b)].map(|(part, x)| (format::tensor_key(path, part), x.into_data())),
                ),
            }
            if let Some(dora) = &adapter.dora {
                tensors.insert(format::tensor_key(path, "lora_magnitude_vector"), dora.magnitude.val().into_data());
            }
            targets.insert(last_segment(path).to_owned());
            config.get_or_insert_with(|| LoraConfig::clone(&adapter.config));
        }
    });
    let on_embedding = collect_tensors(model, name, &mut tensors);
    let Some(mut config) = config.or(on_embedding) else {
        return Err(Error::adapter(name, "is no LoRA adapter of the model"));
    };
    tensors.extend(TrainableBase::new(model, &config)?.state_dict(model));
    config.rank_pattern.extend(kept);
    // Like PEFT, write a wildcard as the list of module names that it matched.
    if matches!(&config.target_modules, TargetModules::Pattern(p) if p == "all-linear") {
        config.target_modules = TargetModules::Suffixes(targets.into_iter().collect());
    }
    Ok(AdapterFiles { config, tensors, unknown_fields: Vec::new() })
}

/// Returns PEFT's tensors of a layer's AdaLoRA adapter, of the ranks that are kept, from `A [r, in]` and `B [out, r]`.
fn adalora_tensors<B: LinearKernels>(
    adalora: &AdaLora<B>,
    [a, b]: [Tensor<B, 2>; 2],
    path: &str,
) -> impl Iterator<Item = (String, TensorData)> {
    let ranks = (0..a.dims()[0]).filter(|&rank| adalora.kept.as_ref().is_none_or(|kept| kept[rank]));
    let ranks: Vec<usize> = ranks.collect();
    let rows = |x: Tensor<B, 2>| {
        let [_, width] = x.dims();
        let all: Vec<f32> = x.into_data().iter().collect();
        let rows: Vec<f32> = ranks.iter().flat_map(|rank| all[rank * width..(rank + 1) * width].to_vec()).collect();
        TensorData::new(rows, [ranks.len(), width])
    };
    let columns = {
        let [out, width] = b.dims();
        let all: Vec<f32> = b.into_data().iter().collect();
        let columns: Vec<f32> = all.chunks(width).flat_map(|row| ranks.iter().map(|&rank| row[rank])).collect();
        TensorData::new(columns, [out, ranks.len()])
    };
    let tensors = [("lora_A", rows(a)), ("lora_E", rows(adalora.lora_e.val())), ("lora_B", columns)];
    tensors.map(|(part, values)| (format!("{}{path}.{part}", format::PREFIX), values)).into_iter()
}
