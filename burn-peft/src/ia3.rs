//! IA3: scales features by learned factors (Liu et al., 2022, arXiv:2205.05638).

use crate::{
    Error, Linear, Linears, TargetModules, adapter::check_new_adapter, config::default_if_null, format, param,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};
use burn_peft_kernels::LinearKernels;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// The IA3 factors of one linear layer: they scale its output features, or its input features in a feed-forward layer.
#[derive(Module, Debug)]
pub struct Ia3<B: LinearKernels> {
    /// PEFT's `ia3_l`: `[out, 1]`, or `[1, in]` in a feed-forward layer.
    pub ia3_l: Param<Tensor<B, 2>>,
    /// The adapter's name.
    pub name: String,
    /// True if the factors are merged into the layer's weight.
    pub merged: bool,
    /// True if the adapter is active: a forward pass without a route applies it.
    pub active: bool,
}

impl<B: LinearKernels> Ia3<B> {
    fn new(path: &str, name: &str, factors: Tensor<B, 2>) -> Self {
        let id = param::id(&format!("{path}.ia3_l.{name}"));
        Self {
            ia3_l: Param::initialized(id, factors.require_grad()),
            name: name.to_owned(),
            merged: false,
            active: true,
        }
    }

    /// Returns true if the factors scale the input features.
    pub fn is_feedforward(&self) -> bool {
        self.ia3_l.lazy_shape()[0] == 1
    }

    /// Scales the features of `x [tokens, features]`.
    pub(crate) fn scale(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (dtype, features) = (x.dtype(), x.dims()[1]);
        (x.cast(DType::F32) * self.ia3_l.val().reshape([1, features])).cast(dtype)
    }
}

/// PEFT's `adapter_config.json` for IA3.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Config {
    /// The layers that get IA3 factors.
    #[serde(deserialize_with = "or_default_targets")]
    pub target_modules: TargetModules,
    /// The target modules whose input features are scaled instead of the output features.
    #[serde(deserialize_with = "or_default_feedforward")]
    pub feedforward_modules: TargetModules,
    /// Layers that get no factors even if `target_modules` selects them.
    pub exclude_modules: Option<TargetModules>,
    /// If true, the factors are initialized to 1, which changes nothing.
    #[serde(deserialize_with = "default_if_null")]
    pub init_ia3_weights: bool,
    /// The name or path of the base model, for information only.
    pub base_model_name_or_path: Option<String>,
}

fn suffixes(names: &[&str]) -> TargetModules {
    TargetModules::Suffixes(names.iter().map(|name| (*name).to_owned()).collect())
}

fn or_default_targets<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<TargetModules, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(|| Ia3Config::default().target_modules))
}

fn or_default_feedforward<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<TargetModules, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(|| Ia3Config::default().feedforward_modules))
}

impl Default for Ia3Config {
    /// Returns PEFT's default for LLaMA.
    fn default() -> Self {
        Self {
            target_modules: suffixes(&["k_proj", "v_proj", "down_proj"]),
            feedforward_modules: suffixes(&["down_proj"]),
            exclude_modules: None,
            init_ia3_weights: true,
            base_model_name_or_path: None,
        }
    }
}

/// Fields that make no difference for a trained adapter.
const IGNORED: [&str; 8] = [
    "auto_mapping",
    "fan_in_fan_out",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
];

impl Ia3Config {
    /// Parses the content of `adapter_config.json`. The second value names unknown fields.
    ///
    /// # Errors
    /// If the adapter is not IA3 or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<(Self, Vec<String>), Error> {
        if value["peft_type"] != "IA3" {
            return Err(Error::format(path, "peft_type", "IA3", &value["peft_type"]));
        }
        for (name, neutral) in [("fan_in_fan_out", json!(false)), ("modules_to_save", Value::Null)] {
            if !value[name].is_null() && value[name] != neutral {
                return Err(Error::format(path, name, format!("{neutral} (nothing else is supported)"), &value[name]));
            }
        }
        let config: Self = serde_json::from_value(value.clone())
            .map_err(|e| Error::format(path, "adapter_config.json", "IA3's fields", e))?;
        let own = json!(Self::default());
        let known = |name: &String| own.get(name).is_some() || IGNORED.contains(&name.as_str());
        let names = value.as_object().into_iter().flat_map(serde_json::Map::keys);
        Ok((config, names.filter(|name| !known(name)).cloned().collect()))
    }

    /// Returns the content of `adapter_config.json` as PEFT writes it.
    pub fn to_json(&self) -> Value {
        let mut all = json!(self);
        let fixed = json!({
            "auto_mapping": null, "fan_in_fan_out": false, "inference_mode": true, "modules_to_save": null,
            "peft_type": "IA3", "revision": null, "task_type": "CAUSAL_LM",
        });
        if let (Value::Object(all), Value::Object(fixed)) = (&mut all, fixed) {
            all.extend(fixed);
            all.sort_keys();
        }
        all
    }

    /// Returns the selected layers' paths and the shapes of their factors. Unties the output head if it is selected.
    fn target_layers<B: LinearKernels, M: Linears<B>>(
        &self,
        model: &mut M,
    ) -> Result<Vec<(String, [usize; 2])>, Error> {
        let (target, feedforward) = (self.target_modules.matcher()?, self.feedforward_modules.matcher()?);
        let exclude = self.exclude_modules.as_ref().map(TargetModules::matcher).transpose()?;
        let selects =
            |path: &str| target.selects(path) && !exclude.as_ref().is_some_and(|exclude| exclude.selects(path));
        if model.tied().is_some_and(|[_, head]| selects(head)) {
            model.untie();
        }
        let (mut selected, mut names) = (Vec::new(), std::collections::BTreeSet::new());
        model.linears(&mut |path, linear| {
            names.insert(path.rsplit('.').next().unwrap_or(path).to_owned());
            if selects(path) {
                let [out, features] = linear.shape();
                let shape = if feedforward.selects(path) { [1, features] } else { [out, 1] };
                selected.push((path.to_owned(), shape));
            }
        });
        if selected.is_empty() {
            let available = names.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::NoTarget { target: self.target_modules.to_string(), available });
        }
        Ok(selected)
    }
}

/// Returns PEFT's key for the factors of the layer at `path`.
fn tensor_key(path: &str) -> String {
    format!("base_model.model.{path}.ia3_l")
}

/// Adds an adapter to the selected layers; `factors` makes its values for a layer's path and shape.
fn inject<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    selected: Vec<(String, [usize; 2])>,
    mut factors: impl FnMut(&str, [usize; 2], &B::Device) -> Tensor<B, 2>,
) {
    let mut selected = selected.into_iter().peekable();
    model.linears_mut(&mut |path, linear: &mut Linear<B>| {
        if let Some((_, shape)) = selected.next_if(|(selected, _)| selected == path) {
            let device = linear.weight.device();
            linear.ia3.push(Ia3::new(path, name, factors(path, shape, &device)));
        }
    });
}

/// Adds IA3 factors of 1 to every layer that `config` selects: they change nothing yet.
///
/// # Errors
/// If nothing is selected, the name is taken, or the configuration asks for random factors.
pub fn attach<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str, config: &Ia3Config) -> Result<(), Error> {
    if !config.init_ia3_weights {
        return Err(Error::config("`init_ia3_weights` should be true: initial factors other than 1 break the model"));
    }
    check_new_adapter(model, name, false)?;
    let selected = config.target_layers(model)?;
    inject(model, name, selected, |_, shape, device| Tensor::ones(shape, (device, DType::F32)));
    Ok(())
}

/// Reads an IA3 adapter from a PEFT directory and adds it to the model as `name`. Returns its configuration and the
/// names of unknown configuration fields.
///
/// # Errors
/// If a file is missing or malformed, if the adapter does not fit the model, or if the name is taken.
pub fn load<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    name: &str,
    directory: &Path,
) -> Result<(Ia3Config, Vec<String>), Error> {
    let path = directory.join(format::CONFIG_NAME);
    let (config, unknown) = Ia3Config::from_json(&path, format::read_config(directory)?)?;
    let mut tensors = format::read_tensors(directory)?;
    check_new_adapter(model, name, false)?;
    let selected = config.target_layers(model)?;
    let expected: Vec<_> = selected.iter().map(|(path, shape)| (tensor_key(path), shape.to_vec())).collect();
    format::check_tensors(directory, &expected, &tensors)?;
    inject(model, name, selected, |path, shape, device| match tensors.remove(&tensor_key(path)) {
        Some(data) => Tensor::from_data(data, (device, DType::F32)),
        None => Tensor::ones(shape, (device, DType::F32)),
    });
    Ok((config, unknown))
}

/// Writes the named adapter as a PEFT directory.
///
/// # Errors
/// If the model has no such adapter or the directory cannot be written.
pub fn save<B: LinearKernels, M: Linears<B>>(
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
    if tensors.is_empty() {
        return Err(Error::InvalidAdapter { name: name.to_owned(), state: "is on no layer of the model" });
    }
    format::write(directory, &config.to_json(), tensors)
}
