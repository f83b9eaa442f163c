//! Combines several adapters, each with a weight, into a new one: PEFT's `add_weighted_adapter`.

use super::{
    linears::Linears,
    registry::{check_exists, check_new_adapter},
};
use crate::{
    Error, Lora, LoraConfig, TargetModules,
    format::{self, AdapterFiles},
    lora::{Factors, LoraSpec, low_rank_decomposition, zero_pad},
    param::last_segment,
    random,
};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_kernels::LinearKernels;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// PEFT's `combination_type`: the way in which adapters are combined. Weights may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombinationType {
    /// Sums the `A` and the `B` matrices, each times `√(weight · scaling)`. Fast, but needs equal ranks, and only a
    /// rough approximation: the product of the sums is not the sum of the products.
    Linear,
    /// Concatenates the adapters along the rank. Exact; the rank is the sum of all ranks.
    Cat,
    /// Approximates the sum of all `B·A` by a truncated SVD of the given rank; by default the largest of their ranks.
    Svd {
        /// The LoRA rank of the result.
        rank: Option<usize>,
    },
}

/// An adapter with its weight in a combination: one of the model by its name (`Weighted<&str>`), or one by its
/// directory (`Weighted<&Path>`).
#[derive(Debug, Clone, Copy)]
pub struct Weighted<A> {
    /// The adapter.
    pub adapter: A,
    /// The weight; it may be negative.
    pub weight: f64,
}

/// One LoRA adapter of a layer; `weight` is its weight in the combination times its scaling.
struct WeightedLora<B: LinearKernels> {
    a: Tensor<B, 2>,
    b: Tensor<B, 2>,
    weight: f64,
}

impl CombinationType {
    /// Returns the LoRA rank of the result.
    fn rank(self, ranks: &[usize]) -> Result<usize, Error> {
        let largest = ranks.iter().copied().max().unwrap_or(0);
        match self {
            Self::Cat => Ok(ranks.iter().sum()),
            Self::Svd { rank: Some(0) } => Err(Error::config("`svd_rank` should be a positive integer value but is 0")),
            Self::Svd { rank } => Ok(rank.unwrap_or(largest)),
            Self::Linear if ranks.iter().all(|&rank| rank == largest) => Ok(largest),
            Self::Linear => {
                let message = format!(
                    "All adapters must have the same r value when using combination_type linear; found {ranks:?}: \
                     use cat or svd"
                );
                Err(Error::config(message))
            }
        }
    }

    /// Computes `A [r, in]` and `B [out, r]` of the combined adapter of the layer at `path`; its scaling is 1.
    fn combine_layer<B: LinearKernels>(
        self,
        path: &str,
        parts: Vec<WeightedLora<B>>,
        r: usize,
    ) -> Result<[Tensor<B, 2>; 2], Error> {
        let scaled = |tensor: &Tensor<B, 2>, by: f64| tensor.clone() * by;
        Ok(match self {
            Self::Linear => {
                let ranks: Vec<usize> = parts.iter().map(|part| part.a.dims()[0]).collect();
                self.rank(&ranks).map_err(|error| Error::config(format!("{path}: {error}")))?;
                let root = |part: &WeightedLora<B>| part.weight.abs().sqrt();
                let a = parts.iter().map(|part| scaled(&part.a, root(part) * part.weight.signum()));
                let b = parts.iter().map(|part| scaled(&part.b, root(part)));
                [sum(a), sum(b)]
            }
            Self::Cat => {
                let a = Tensor::cat(parts.iter().map(|part| scaled(&part.a, part.weight)).collect(), 0);
                let b = Tensor::cat(parts.into_iter().map(|part| part.b).collect(), 1);
                [zero_pad(a, 0, r), zero_pad(b, 1, r)]
            }
            Self::Svd { .. } => {
                let delta = sum(parts.iter().map(|part| scaled(&part.b, part.weight).matmul(part.a.clone())));
                let [out, features] = delta.dims();
                let Factors { a, b } =
                    low_rank_decomposition(delta, r.min(out).min(features), None, random::key_from_str(path));
                // Each factor holds the square roots of the singular values; PEFT puts them into B alone.
                let root = a.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(f32::MIN_POSITIVE);
                let b = b * root.clone().transpose();
                [zero_pad(a / root, 0, r), zero_pad(b, 1, r)]
            }
        })
    }
}

fn sum<B: LinearKernels>(mut parts: impl Iterator<Item = Tensor<B, 2>>) -> Tensor<B, 2> {
    let first = parts.next().expect("at least one adapter of a layer");
    parts.fold(first, |sum, part| sum + part)
}

/// Returns the number of weights, or an error if there are none or one is not finite.
fn check_weights<A>(adapters: &[Weighted<A>]) -> Result<usize, Error> {
    match adapters.iter().find(|part| !part.weight.is_finite()) {
        Some(Weighted { weight, .. }) => {
            Err(Error::config(format!("weights of adapters: expected finite numbers, found {weight}")))
        }
        None if adapters.is_empty() => {
            Err(Error::config("weights of adapters: expected at least one adapter, found none"))
        }
        None => Ok(adapters.len()),
    }
}

/// Returns the combination type to use: a single adapter is only scaled, as in PEFT.
fn effective(how: CombinationType, adapters: usize) -> CombinationType {
    if adapters == 1 { CombinationType::Linear } else { how }
}

fn combined_config(r: usize, target_modules: TargetModules, dropout: f64) -> LoraConfig {
    LoraConfig { r, lora_alpha: r as f64, lora_dropout: dropout, target_modules, ..LoraConfig::default() }
}

/// Adds the adapter `name`, the weighted combination of the given LoRA adapters of the model, to every layer that has
/// one of them. It is not active yet: see [`activate`](super::activate). Returns its configuration.
///
/// # Errors
/// If a name is unknown or the new one is taken, if an adapter uses DoRA or changed the base model, if there are no
/// weights or one is not finite, or if ranks differ with [`CombinationType::Linear`]; the model is then unchanged.
pub fn combine<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    adapters: &[Weighted<&str>],
    how: CombinationType,
) -> Result<LoraConfig, Error> {
    let how = effective(how, check_weights(adapters)?);
    adapters.iter().try_for_each(|part| check_exists(model, part.adapter))?;
    check_new_adapter(model, name, false)?;
    let ranks = adapters.iter().map(|part| max_rank(model, part.adapter)).collect::<Result<Vec<_>, _>>()?;
    let (r, mut made, mut result) = (how.rank(&ranks)?, BTreeMap::new(), Ok(()));
    let mut dropout = None;
    model.linears(&mut |path, linear| {
        let part = |part: &Weighted<&str>| {
            let lora = linear.adapter(part.adapter)?;
            dropout = dropout.or(Some(lora.config.lora_dropout));
            let (a, b) = (lora.down_weight().detach(), lora.lora_b.val().detach());
            Some(WeightedLora { a, b, weight: part.weight * lora.scaling })
        };
        let parts: Vec<_> = adapters.iter().filter_map(part).collect();
        if !parts.is_empty() && result.is_ok() {
            result = how.combine_layer(path, parts, r).map(|pair| drop(made.insert(path.to_owned(), pair)));
        }
    });
    result?;
    let config = combined_config(r, exact_target_modules(model, made.keys()), dropout.unwrap_or(0.0));
    model.linears_mut(&mut |path, linear| {
        if let Some([a, b]) = made.remove(path) {
            let mut lora = Lora::from_tensors(LoraSpec { path, name, config: &config }, a, b);
            lora.active = false;
            linear.adapters.push(lora);
        }
    });
    Ok(config)
}

/// Returns the largest rank of an adapter over all layers, or an error if the adapter cannot be combined.
fn max_rank<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Result<usize, Error> {
    let (mut rank, mut odd) = (0, false);
    model.linears(&mut |_, linear| {
        if let Some(lora) = linear.adapter(name) {
            rank = rank.max(lora.lora_a.lazy_shape()[0]);
            odd |= lora.dora.is_some() || lora.config.changes_base() || lora.merged;
        }
    });
    let state = "cannot be combined: only LoRA of linear layers without DoRA, bias, modules_to_save and PiSSA can, and not while \
         it is merged";
    let on_embedding = model.embedding().is_some_and(|(_, embedding)| embedding.adapter(name).is_some());
    if rank == 0 || odd || on_embedding { Err(Error::adapter(name, state)) } else { Ok(rank) }
}

/// Returns the `target_modules` that select exactly these layers of the model: module names if possible, else paths.
fn exact_target_modules<'a, B: LinearKernels, M: Linears<B>>(
    model: &M,
    paths: impl Iterator<Item = &'a String>,
) -> TargetModules {
    let paths: BTreeSet<&String> = paths.collect();
    let names: BTreeSet<String> = paths.iter().map(|path| last_segment(path).to_owned()).collect();
    let mut selected = 0;
    model.linears(&mut |path, _| selected += usize::from(names.contains(last_segment(path))));
    TargetModules::Suffixes(match selected == paths.len() {
        true => names.into_iter().collect(),
        false => paths.into_iter().cloned().collect(),
    })
}

/// Writes the weighted combination of the LoRA adapters in the given directories to the directory `out`. No model is
/// needed.
///
/// # Errors
/// As for [`combine`], or if a directory cannot be read or written.
pub fn combine_directories<B: LinearKernels>(
    adapters: &[Weighted<&Path>],
    how: CombinationType,
    out: &Path,
    device: &B::Device,
) -> Result<LoraConfig, Error> {
    let how = effective(how, check_weights(adapters)?);
    let LoadedAdapters { configs, layers } = load_adapters(adapters, device)?;
    let largest = |config: &LoraConfig| {
        let others = config.rank_pattern.values().filter_map(serde_json::Value::as_u64);
        others.map(|rank| rank as usize).fold(config.r, usize::max)
    };
    let r = how.rank(&configs.iter().map(largest).collect::<Vec<_>>())?;
    let mut config = combined_config(r, union_target_modules(&configs, &layers), configs[0].lora_dropout);
    config.base_model_name_or_path.clone_from(&configs[0].base_model_name_or_path);
    let mut tensors = Vec::new();
    for (path, parts) in layers {
        let shapes = |part: &WeightedLora<B>| [part.b.dims()[0], part.a.dims()[1]];
        if parts.iter().any(|part| shapes(part) != shapes(&parts[0])) {
            let message = format!("{path}: the adapters were made for layers of other shapes");
            return Err(Error::Mismatch { path: adapters[adapters.len() - 1].adapter.to_owned(), message });
        }
        let [a, b] = how.combine_layer(&path, parts, r)?;
        tensors.push((format::tensor_key(&path, "lora_A"), a.into_data()));
        tensors.push((format::tensor_key(&path, "lora_B"), b.into_data()));
    }
    format::write(out, &config.to_json(), tensors)?;
    Ok(config)
}

/// The adapters to combine.
struct LoadedAdapters<B: LinearKernels> {
    /// The configurations of all adapters.
    configs: Vec<LoraConfig>,
    /// The LoRA matrices of all adapters, by layer path.
    layers: BTreeMap<String, Vec<WeightedLora<B>>>,
}

fn load_adapters<B: LinearKernels>(
    adapters: &[Weighted<&Path>],
    device: &B::Device,
) -> Result<LoadedAdapters<B>, Error> {
    let (mut configs, mut layers) = (Vec::new(), BTreeMap::<String, Vec<WeightedLora<B>>>::new());
    for &Weighted { adapter: directory, weight } in adapters {
        let AdapterFiles { config, mut tensors, .. } = format::read(directory)?;
        if config.use_dora || config.changes_base() {
            let expected = "LoRA without DoRA, bias, modules_to_save and PiSSA; only that can be combined";
            return Err(Error::format(directory, "adapter_config.json", expected, "another adapter"));
        }
        if let Some(other) =
            tensors.keys().find(|key| !key.ends_with(".lora_A.weight") && !key.ends_with(".lora_B.weight"))
        {
            return Err(Error::format(
                directory,
                other,
                "LoRA of linear layers alone; only that can be combined",
                "it",
            ));
        }
        let paths: Vec<String> = tensors.keys().filter_map(|key| layer_path(key)).collect();
        for path in paths {
            let mut take = |part| tensors.remove(&format::tensor_key(&path, part));
            let Some((a, b)) = take("lora_A").zip(take("lora_B")) else {
                let message = format!("{path} has no lora_B");
                return Err(Error::Mismatch { path: directory.to_owned(), message });
            };
            let r = config.rank_at(&path);
            if !matches!((a.shape.as_slice(), b.shape.as_slice()), ([k, _], [_, l]) if *k == r && *l == r) {
                let message = format!("{path}: expected rank {r}, found {:?} and {:?}", a.shape, b.shape);
                return Err(Error::Mismatch { path: directory.to_owned(), message });
            }
            let tensor = |data: TensorData| Tensor::<B, 2>::from_data(data, (device, DType::F32));
            let weight = weight * config.scaling_at(&path);
            layers.entry(path).or_default().push(WeightedLora { a: tensor(a), b: tensor(b), weight });
        }
        configs.push(config);
    }
    Ok(LoadedAdapters { configs, layers })
}

fn layer_path(key: &str) -> Option<String> {
    Some(key.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")?.to_owned())
}

/// Returns the `target_modules` that select the layers of all adapters: the union of the name lists if every
/// configuration is a plain list of names, else the layers' paths.
fn union_target_modules<B: LinearKernels>(
    configs: &[LoraConfig],
    layers: &BTreeMap<String, Vec<WeightedLora<B>>>,
) -> TargetModules {
    let names = |config: &LoraConfig| match &config.target_modules {
        TargetModules::Suffixes(names) if config.exclude_modules.is_none() && config.layers_to_transform.is_none() => {
            Some(names.clone())
        }
        _ => None,
    };
    let lists: Option<Vec<Vec<String>>> = configs.iter().map(names).collect();
    TargetModules::Suffixes(match lists {
        Some(lists) => lists.into_iter().flatten().collect::<BTreeSet<_>>().into_iter().collect(),
        None => layers.keys().cloned().collect(),
    })
}
