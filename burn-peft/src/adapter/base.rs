//! What of the base model learns beside an adapter: biases (`bias`) and whole modules (`modules_to_save`). They learn in
//! place: what the model was without the adapter is in its own files.

use super::{Linears, targets};
use crate::{Error, LoraConfig, config::Bias, kernel::LinearKernels, param, target::Selection};
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use std::collections::{BTreeMap, BTreeSet};

/// Whether the parameter at `path` belongs to an adapter or a prompt.
pub fn is_adapter(path: &str) -> bool {
    path.split('.').any(|part| matches!(part, "adapters" | "ia3" | "prompt" | "prompts"))
}

/// Lets only the adapters learn and what `config` lets learn beside them. Every parameter becomes a leaf.
///
/// # Errors
/// If the configuration selects nothing.
pub fn train_only<B: LinearKernels, M: Linears<B> + Module<B>>(model: M, config: &LoraConfig) -> Result<M, Error> {
    let (base, idle) = (Base::new(&model, config)?, Idle::new(&model));
    Ok(param::train_only(model, |path| (is_adapter(path) && !idle.has(path)) || base.learned.contains_key(path)))
}

/// Lets only the active adapters learn. Every parameter becomes a leaf.
pub fn train_active<B: LinearKernels, M: Linears<B> + Module<B>>(model: M) -> M {
    let idle = Idle::new(&model);
    param::train_only(model, |path| is_adapter(path) && !idle.has(path))
}

/// Where adapters are that are not active: the beginnings of their parameters' paths.
struct Idle(Vec<String>);

impl Idle {
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

    fn has(&self, path: &str) -> bool {
        self.0.iter().any(|start| path.starts_with(start))
    }
}

/// Parts a head from the embedding that is its weight where `config` changes one of the two.
pub(super) fn untie<B: LinearKernels, M: Linears<B>>(model: &mut M, config: &LoraConfig) -> Result<(), Error> {
    let selection = Selection::new(config)?;
    let apart =
        |[embedding, head]: [&str; 2]| selection.saves(embedding) || selection.saves(head) || selection.selects(head);
    if model.tied().is_some_and(apart) {
        model.untie();
    }
    Ok(())
}

/// The layers of an adapter and the base model's parameters that learn with it.
pub(super) struct Base {
    adapted: BTreeSet<String>,
    /// By path: PEFT's key and the shape.
    learned: BTreeMap<String, (String, Vec<usize>)>,
}

impl Base {
    pub fn new<B: LinearKernels, M: Linears<B> + Module<B>>(model: &M, config: &LoraConfig) -> Result<Self, Error> {
        let adapted: BTreeSet<String> = targets(model, config)?.into_iter().collect();
        let selection = Selection::new(config)?;
        super::all(
            model,
            |path, linear| {
                if selection.saves(path) { linear.weight.writable("modules_to_save") } else { Ok(()) }
            },
        )?;
        let (mut modules, mut learned) = (BTreeSet::new(), BTreeMap::new());
        let mut saved = BTreeSet::new();
        for (path, shape, _) in param::list::<B, M>(model) {
            if is_adapter(&path) {
                continue;
            }
            let (module, name) = path.rsplit_once('.').unwrap_or(("", &path));
            let layer = adapted.contains(module);
            let bias = name == "bias" && (config.bias == Bias::All || config.bias == Bias::LoraOnly && layer);
            modules.insert(module.rsplit('.').next().unwrap_or(module).to_owned());
            saved.extend(selection.savers(module).cloned());
            if bias || selection.saves(module) {
                // PEFT wraps the layers that it adapts.
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
        Ok(Self { adapted, learned })
    }

    /// Whether the layer at `path` has an adapter.
    pub fn adapted(&self, path: &str) -> bool {
        self.adapted.contains(path)
    }

    /// Keys and shapes of what learns.
    pub fn expected(&self) -> Vec<(String, Vec<usize>)> {
        self.learned.values().cloned().collect()
    }

    /// Stores what learns as f32, the type that weights learn in.
    pub fn widen<B: Backend, M: Module<B>>(&self, model: &mut M) {
        self.replace(model, &BTreeMap::new());
    }

    /// Takes what learns from `tensors`, as far as it is there.
    pub fn replace<B: Backend, M: Module<B>>(&self, model: &mut M, tensors: &BTreeMap<String, TensorData>) {
        if !self.learned.is_empty() {
            *model = model.clone().map(&mut Replace { path: Vec::new(), base: self, tensors });
        }
    }

    /// What learns, by key, as f32.
    pub fn tensors<B: Backend, M: Module<B>>(&self, model: &M) -> Vec<(String, TensorData)> {
        let mut read = Read { path: Vec::new(), base: self, found: Vec::new() };
        model.visit(&mut read);
        read.found
    }
}

struct Replace<'a> {
    path: Vec<String>,
    base: &'a Base,
    tensors: &'a BTreeMap<String, TensorData>,
}

impl<B: Backend> ModuleMapper<B> for Replace<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some((key, _)) = self.base.learned.get(&self.path.join(".")) else { return param };
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

struct Read<'a> {
    path: Vec<String>,
    base: &'a Base,
    found: Vec<(String, TensorData)>,
}

impl<B: Backend> ModuleVisitor<B> for Read<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some((key, _)) = self.base.learned.get(&self.path.join(".")) {
            self.found.push((key.clone(), param.val().cast(DType::F32).into_data()));
        }
    }
}
