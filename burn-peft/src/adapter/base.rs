//! Parameters of the base model that are trained along with an adapter: biases (`bias`) and whole modules
//! (`modules_to_save`). They are trained in place; their original values remain only in the base model's files.

use super::{
    embedding::EmbeddingTarget,
    linears::{Linears, check_layers},
    saved_embeddings,
    targets::targeted_module_names,
};
use crate::{
    Error, LoraConfig,
    config::{Bias, Selection},
    format,
    param::{self, ParamInfo, ParamMapper, ParamVisitor},
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_peft_kernels::LinearKernels;
use std::collections::{BTreeMap, BTreeSet};

/// Returns true if the parameter at `path` belongs to an adapter or a prompt.
pub fn is_adapter(path: &str) -> bool {
    path.split('.').any(|part| matches!(part, "adapters" | "ia3" | "prompt" | "prompts"))
}

/// Unties the output head from the embedding if `config` changes one of the two.
///
/// # Errors
/// If `config` changes both, in ways that cannot be told apart.
pub(super) fn untie<B: LinearKernels, M: Linears<B>>(model: &mut M, config: &LoraConfig) -> Result<(), Error> {
    let selection = Selection::new(config)?;
    let apart = |[embedding, head]: [&str; 2]| {
        selection.in_modules_to_save(embedding) || selection.in_modules_to_save(head) || selection.selects(head)
    };
    let Some([embedding, head]) = model.tied().filter(|tied| apart(*tied)).map(|tied| tied.map(str::to_owned)) else {
        return Ok(());
    };
    let both = |what: &str| {
        Error::config(format!(
            "{what} and an adapter of `{head}`, which shares the weight of `{embedding}`: choose one"
        ))
    };
    if config.trainable_token_indices.is_some() {
        return Err(both("`trainable_token_indices`"));
    }
    if selection.selects(&head) && config.init_lora_weights.mutates_base_weights() {
        return Err(both("`init_lora_weights` that changes the base weight"));
    }
    model.untie();
    Ok(())
}

/// The layers that an adapter targets, and the base model's parameters that are in its file: those that are trained
/// along with it, and an embedding and a head that only come with it.
pub(super) struct TrainableBase {
    target_paths: BTreeSet<String>,
    /// The base model's parameters in the file, by path.
    base_params: BTreeMap<String, BaseParam>,
}

/// A parameter of the base model that is in an adapter's file.
struct BaseParam {
    peft_key: String,
    shape: Vec<usize>,
    trained: bool,
    /// True if another rank holds the parameter.
    elsewhere: bool,
}

impl TrainableBase {
    pub(super) fn new<B: LinearKernels, M: Linears<B> + Module<B>>(
        model: &M,
        config: &LoraConfig,
    ) -> Result<Self, Error> {
        let target_paths: BTreeSet<String> = targeted_module_names(model, config)?.into_iter().collect();
        let selection = Selection::new(config)?;
        let embedding = EmbeddingTarget::new(model, config)?;
        let saved_paths = match config.save_embedding_layers {
            true => saved_embeddings::paths(model, config)?.into_iter().flatten().collect(),
            false => BTreeSet::new(),
        };
        check_layers(model, |path, linear| {
            if selection.in_modules_to_save(path) { linear.weight.check_writable("modules_to_save") } else { Ok(()) }
        })?;
        let (mut modules, mut base_params) = (BTreeSet::new(), BTreeMap::new());
        let mut saved = BTreeSet::new();
        for ParamInfo { path, shape, .. } in param::named_parameters::<B, M>(model) {
            if is_adapter(&path) {
                continue;
            }
            let (module, name) = path.rsplit_once('.').unwrap_or(("", &path));
            let layer = target_paths.contains(module);
            let bias = name == "bias" && (config.bias == Bias::All || config.bias == Bias::LoraOnly && layer);
            modules.insert(param::last_segment(module).to_owned());
            saved.extend(selection.matching_modules_to_save(module).cloned());
            let trained = bias || selection.in_modules_to_save(module);
            if trained || saved_paths.contains(module) {
                // PEFT wraps adapted layers: their own parameters are under `base_layer`, or of the
                // adapter of single rows.
                let wrapped = embedding.as_ref().filter(|embedding| embedding.wraps(model, module));
                let inner = match wrapped.map(EmbeddingTarget::is_lora) {
                    None if !layer => "",
                    Some(false) => ".token_adapter.base_layer",
                    _ => ".base_layer",
                };
                let peft_key = format!("{}{module}{inner}.{name}", format::PREFIX);
                let whole = model.shape_elsewhere(&path);
                let elsewhere = whole.is_some();
                let param = BaseParam { peft_key, shape: whole.unwrap_or(shape), trained, elsewhere };
                base_params.insert(path, param);
            }
        }
        let missing = config.modules_to_save.iter().flatten().find(|name| !saved.contains(*name));
        if let Some(missing) = missing {
            let available = modules.into_iter().collect::<Vec<_>>().join(", ");
            let message = format!("`modules_to_save`: expected modules among {available}, found {missing:?}");
            return Err(Error::config(message));
        }
        Ok(Self { target_paths, base_params })
    }

    /// Returns true if the adapter targets the layer at `path`.
    pub(super) fn is_target(&self, path: &str) -> bool {
        self.target_paths.contains(path)
    }

    /// Returns true if the base model's parameter at `path` is trained along with the adapter.
    pub(super) fn is_trained(&self, path: &str) -> bool {
        self.base_params.get(path).is_some_and(|param| param.trained)
    }

    /// Returns the keys and shapes of the base model's trained parameters in PEFT's file.
    pub(super) fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let trained = self.base_params.values().filter(|param| param.trained);
        trained.map(|param| (param.peft_key.clone(), param.shape.clone())).collect()
    }

    /// Casts the base model's trained parameters to f32, the type in which weights are trained.
    pub(super) fn cast_to_f32<B: Backend, M: Module<B>>(&self, model: &mut M) {
        self.load_tensors(model, &BTreeMap::new());
    }

    /// Casts the base model's trained parameters to f32 and sets those parameters that `tensors` contains.
    pub(super) fn load_tensors<B: Backend, M: Module<B>>(&self, model: &mut M, tensors: &BTreeMap<String, TensorData>) {
        if !self.base_params.is_empty() {
            *model = param::map_params(model.clone(), &mut LoadParams { base: self, tensors });
        }
    }

    /// Returns the values of the base model's parameters in PEFT's file, in f32 and by their keys there.
    pub(super) fn state_dict<B: Backend, M: Module<B>>(&self, model: &M) -> Vec<(String, TensorData)> {
        let mut read = CollectParams { base: self, found: Vec::new() };
        param::visit_params(model, &mut read);
        read.found
    }
}

struct LoadParams<'a> {
    base: &'a TrainableBase,
    tensors: &'a BTreeMap<String, TensorData>,
}

impl<B: Backend> ParamMapper<B> for LoadParams<'_> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(BaseParam { peft_key, trained: true, elsewhere, .. }) = self.base.base_params.get(path) else {
            return param;
        };
        let (id, tensor, mapper) = param.consume();
        let (on, device) = (tensor.is_require_grad(), tensor.device());
        let tensor = match self.tensors.get(peft_key).filter(|_| !elsewhere) {
            Some(data) => Tensor::from_data(data.clone(), (&device, DType::F32)),
            None if tensor.dtype() == DType::F32 => tensor,
            None => tensor.detach().cast(DType::F32),
        };
        Param::from_mapped_value(id, tensor.detach().set_require_grad(on), mapper)
    }
}

struct CollectParams<'a> {
    base: &'a TrainableBase,
    found: Vec<(String, TensorData)>,
}

impl<B: Backend> ParamVisitor<B> for CollectParams<'_> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<B, D>>) {
        if let Some(BaseParam { peft_key, .. }) = self.base.base_params.get(path) {
            self.found.push((peft_key.clone(), param.val().cast(DType::F32).into_data()));
        }
    }
}
