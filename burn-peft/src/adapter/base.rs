//! Parameters of the base model that are trained along with an adapter: biases (`bias`) and whole modules
//! (`modules_to_save`). They are trained in place; their original values remain only in the base model's files.

use super::{Linears, targeted_module_names};
use crate::{Error, LoraConfig, config::Bias, param, target::Selection};
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_peft_kernels::LinearKernels;
use std::collections::{BTreeMap, BTreeSet};

/// Returns true if the parameter at `path` belongs to an adapter or a prompt.
pub fn is_adapter(path: &str) -> bool {
    path.split('.').any(|part| matches!(part, "adapters" | "ia3" | "prompt" | "prompts"))
}

/// Makes only the active adapters trainable, and the parameters of the base model that `config` trains along with them.
/// Every parameter becomes a leaf of the autodiff graph.
///
/// # Errors
/// If the configuration selects nothing.
pub fn train_only<B: LinearKernels, M: Linears<B> + Module<B>>(model: M, config: &LoraConfig) -> Result<M, Error> {
    let (base, idle) = (TrainableBase::new(&model, config)?, InactiveAdapters::new(&model));
    Ok(param::train_only(model, |path| {
        (is_adapter(path) && !idle.contains(path)) || base.base_params.contains_key(path)
    }))
}

/// Makes only the active adapters trainable. Every parameter becomes a leaf of the autodiff graph.
pub fn train_active<B: LinearKernels, M: Linears<B> + Module<B>>(model: M) -> M {
    let idle = InactiveAdapters::new(&model);
    param::train_only(model, |path| is_adapter(path) && !idle.contains(path))
}

/// The path prefixes of the parameters of inactive adapters.
struct InactiveAdapters(Vec<String>);

impl InactiveAdapters {
    fn new<B: LinearKernels, M: Linears<B>>(model: &M) -> Self {
        let mut idle = Vec::new();
        model.linears(&mut |path, linear| {
            let low_rank = linear.adapters.iter().map(|adapter| adapter.active).enumerate();
            let factors = linear.ia3.iter().map(|ia3| ia3.active).enumerate();
            let off =
                |(index, active): (usize, bool), field: &str| (!active).then(|| format!("{path}.{field}.{index}."));
            idle.extend(low_rank.filter_map(|at| off(at, "adapters")));
            idle.extend(factors.filter_map(|at| off(at, "ia3")));
        });
        let first = model.prompts().iter().position(|prompt| prompt.active);
        let others = (0..model.prompts().len()).filter(|&index| Some(index) != first);
        idle.extend(others.map(|index| format!("prompts.{index}.")));
        Self(idle)
    }

    fn contains(&self, path: &str) -> bool {
        self.0.iter().any(|start| path.starts_with(start))
    }
}

/// Unties the output head from the embedding if `config` changes one of the two.
pub(super) fn untie<B: LinearKernels, M: Linears<B>>(model: &mut M, config: &LoraConfig) -> Result<(), Error> {
    let selection = Selection::new(config)?;
    let apart = |[embedding, head]: [&str; 2]| {
        selection.in_modules_to_save(embedding) || selection.in_modules_to_save(head) || selection.selects(head)
    };
    if model.tied().is_some_and(apart) {
        model.untie();
    }
    Ok(())
}

/// The layers that an adapter targets, and the base model's parameters that are trained along with it.
pub(super) struct TrainableBase {
    target_paths: BTreeSet<String>,
    /// Key in PEFT's file and shape, by parameter path.
    base_params: BTreeMap<String, (String, Vec<usize>)>,
}

impl TrainableBase {
    pub fn new<B: LinearKernels, M: Linears<B> + Module<B>>(model: &M, config: &LoraConfig) -> Result<Self, Error> {
        let adapted: BTreeSet<String> = targeted_module_names(model, config)?.into_iter().collect();
        let selection = Selection::new(config)?;
        super::check_layers(model, |path, linear| {
            if selection.in_modules_to_save(path) { linear.weight.check_writable("modules_to_save") } else { Ok(()) }
        })?;
        let (mut modules, mut learned) = (BTreeSet::new(), BTreeMap::new());
        let mut saved = BTreeSet::new();
        for (path, shape, _) in param::named_parameters::<B, M>(model) {
            if is_adapter(&path) {
                continue;
            }
            let (module, name) = path.rsplit_once('.').unwrap_or(("", &path));
            let layer = adapted.contains(module);
            let bias = name == "bias" && (config.bias == Bias::All || config.bias == Bias::LoraOnly && layer);
            modules.insert(module.rsplit('.').next().unwrap_or(module).to_owned());
            saved.extend(selection.matching_modules_to_save(module).cloned());
            if bias || selection.in_modules_to_save(module) {
                // PEFT wraps adapted layers: their own parameters are under `base_layer`.
                let inner = if layer { ".base_layer" } else { "" };
                learned.insert(path.clone(), (format!("base_model.model.{module}{inner}.{name}"), shape));
            }
        }
        let missing = config.modules_to_save.iter().flatten().find(|name| !saved.contains(*name));
        if let Some(missing) = missing {
            let available = modules.into_iter().collect::<Vec<_>>().join(", ");
            let message = format!("`modules_to_save`: expected modules among {available}, found {missing:?}");
            return Err(Error::config(message));
        }
        Ok(Self { target_paths: adapted, base_params: learned })
    }

    /// Returns true if the adapter targets the layer at `path`.
    pub fn is_target(&self, path: &str) -> bool {
        self.target_paths.contains(path)
    }

    /// Returns the keys and shapes of the base model's trained parameters in PEFT's file.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.base_params.values().cloned().collect()
    }

    /// Casts the base model's trained parameters to f32, the type in which weights are trained.
    pub fn cast_to_f32<B: Backend, M: Module<B>>(&self, model: &mut M) {
        self.load_tensors(model, &BTreeMap::new());
    }

    /// Casts the base model's trained parameters to f32 and sets those that `tensors` contains.
    pub fn load_tensors<B: Backend, M: Module<B>>(&self, model: &mut M, tensors: &BTreeMap<String, TensorData>) {
        if !self.base_params.is_empty() {
            *model = model.clone().map(&mut LoadParams { path: Vec::new(), base: self, tensors });
        }
    }

    /// Returns the values of the base model's trained parameters in f32, by their keys in PEFT's file.
    pub fn state_dict<B: Backend, M: Module<B>>(&self, model: &M) -> Vec<(String, TensorData)> {
        let mut read = CollectParams { path: Vec::new(), base: self, found: Vec::new() };
        model.visit(&mut read);
        read.found
    }
}

struct LoadParams<'a> {
    path: Vec<String>,
    base: &'a TrainableBase,
    tensors: &'a BTreeMap<String, TensorData>,
}

impl<B: Backend> ModuleMapper<B> for LoadParams<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some((key, _)) = self.base.base_params.get(&self.path.join(".")) else { return param };
        let (id, tensor, mapper) = param.consume();
        let (on, device) = (tensor.is_require_grad(), tensor.device());
        let tensor = match self.tensors.get(key) {
            Some(data) => Tensor::from_data(data.clone(), (&device, DType::F32)),
            None if tensor.dtype() == DType::F32 => tensor,
            None => tensor.detach().cast(DType::F32),
        };
        Param::from_mapped_value(id, tensor.detach().set_require_grad(on), mapper)
    }
}

struct CollectParams<'a> {
    path: Vec<String>,
    base: &'a TrainableBase,
    found: Vec<(String, TensorData)>,
}

impl<B: Backend> ModuleVisitor<B> for CollectParams<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some((key, _)) = self.base.base_params.get(&self.path.join(".")) {
            self.found.push((key.clone(), param.val().cast(DType::F32).into_data()));
        }
    }
}
