//! The base model's embedding and output head in an adapter's file, where PEFT writes them after the vocabulary has
//! grown (`save_embedding_layers`).

use super::{linears::Linears, registry};
use crate::{Error, LoraConfig, Weight, config::Selection, format};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_kernels::LinearKernels;
use std::{collections::BTreeMap, path::Path};

/// The ends of the names under which PEFT writes the weight of a module that an adapter may wrap.
const ENDS: [&str; 4] =
    [".weight", ".base_layer.weight", ".original_module.weight", ".token_adapter.base_layer.weight"];

/// The path of the output head, as in PEFT's `EMBEDDING_LAYER_NAMES`.
pub(super) const HEAD: &str = "lm_head";

/// Returns every name that the weight of the module at `path` may have in an adapter's file.
pub(super) fn names(path: &str) -> impl Iterator<Item = String> {
    ENDS.map(|end| format!("{}{path}{end}", format::PREFIX)).into_iter()
}

/// The weights of the embedding and of the output head in an adapter's file.
pub(super) struct SavedEmbeddings {
    embedding: Option<TensorData>,
    head: Option<TensorData>,
}

/// Returns the paths of the embedding and of the output head that `config` does not train as a whole.
pub(super) fn paths<B: LinearKernels, M: Linears<B>>(
    model: &M,
    config: &LoraConfig,
) -> Result<[Option<String>; 2], Error> {
    let selection = Selection::new(config)?;
    let embedding = model.embedding().map(|(path, _)| path.to_owned());
    let mut head = model.tied().map(|[_, head]| head.to_owned());
    model.linears(&mut |path, _| {
        if path == HEAD {
            head = Some(path.to_owned());
        }
    });
    Ok([embedding, head].map(|path| path.filter(|path| !selection.in_modules_to_save(path))))
}

/// Prepares the model for an embedding and a head that `modules_to_save` names: it grows to their rows. Their originals,
/// which PEFT writes too, are dropped from `tensors`.
///
/// # Errors
/// If `config` has a pattern that is not a regular expression.
pub(super) fn prepare_modules_to_save<B: LinearKernels, M: Linears<B>>(
    model: &mut M,
    config: &LoraConfig,
    tensors: &mut BTreeMap<String, TensorData>,
) -> Result<(), Error> {
    let selection = Selection::new(config)?;
    let embedding = model.embedding().map(|(path, embedding)| (path.to_owned(), embedding.shape()[0]));
    let Some((embedding, rows)) = embedding else { return Ok(()) };
    for path in [embedding.as_str(), HEAD].into_iter().filter(|path| selection.in_modules_to_save(path)) {
        tensors.remove(&format!("{}{path}.original_module.weight", format::PREFIX));
        let saved = tensors.get(&format!("{}{path}.weight", format::PREFIX)).map(|data| data.shape[0]);
        if let Some(saved) = saved.filter(|&saved| saved > rows) {
            model.resize_token_embeddings(saved);
        }
    }
    Ok(())
}

impl SavedEmbeddings {
    /// Takes the weights out of `tensors`.
    ///
    /// # Errors
    /// If they do not fit the model.
    pub(super) fn take<B: LinearKernels, M: Linears<B>>(
        model: &M,
        config: &LoraConfig,
        directory: &Path,
        tensors: &mut BTreeMap<String, TensorData>,
    ) -> Result<Self, Error> {
        let hidden = model.embedding().map(|(_, embedding)| embedding.shape()[1]);
        let mut found = Vec::new();
        for path in paths(model, config)? {
            // A wrapped weight may stand in the file under two names.
            let names = path.iter().flat_map(|path| names(path));
            let mut all = names.filter_map(|name| tensors.remove(&name).map(|data| (name, data)));
            let first = all.next();
            let differs = |(one, data): &(String, TensorData)| {
                let (other, _) = all.find(|(_, other)| other != data)?;
                Some(format!("{one} and {other} are two different weights of one module"))
            };
            if let Some(message) = first.as_ref().and_then(differs) {
                return Err(Error::Mismatch { path: directory.to_owned(), message });
            }
            found.push(first.map(|(_, data)| data));
        }
        let mut rows = found.iter().flatten().map(|data| data.shape.to_vec());
        if let Some(first) = rows.next()
            && (rows.any(|other| other != first) || first.len() != 2 || Some(first[1]) != hidden)
        {
            let shapes: Vec<_> = found.iter().flatten().map(|data| data.shape.to_vec()).collect();
            let message = format!(
                "the embedding and the output head in it have the shapes {shapes:?}, but the model has {hidden:?} columns"
            );
            return Err(Error::Mismatch { path: directory.to_owned(), message });
        }
        let head = found.pop().flatten();
        Ok(Self { embedding: found.pop().flatten(), head })
    }

    /// Returns whether the file has the weight of the output head.
    pub(super) fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Checks that the weights may replace those of the model.
    ///
    /// # Errors
    /// If another adapter shares the model.
    pub(super) fn check_new_adapter<B: LinearKernels, M: Linears<B>>(
        &self,
        model: &M,
        name: &str,
    ) -> Result<(), Error> {
        registry::check_new_adapter(model, name, self.embedding.is_some() || self.head.is_some())
    }

    /// Replaces the model's embedding and output head; a model with fewer rows grows. Returns true if that changes the
    /// model.
    pub(super) fn install<B: LinearKernels, M: Linears<B>>(self, model: &mut M) -> bool {
        let Some(rows) = self.embedding.iter().chain(&self.head).map(|data| data.shape[0]).next() else { return false };
        let before = model.embedding().map(|(_, embedding)| embedding.shape()[0]);
        let mut changed = before.is_some_and(|before| before != rows);
        if changed {
            model.resize_token_embeddings(rows);
        }
        let tied = model.tied().is_some();
        if tied && self.head.is_some() && self.embedding.is_some() && self.head != self.embedding {
            model.untie();
        }
        let embedding = if tied { self.embedding.or(self.head.clone()) } else { self.embedding };
        if let (Some(values), Some((path, embedding))) = (embedding, model.embedding_mut()) {
            let elsewhere = embedding.is_elsewhere();
            changed |= replace(&mut embedding.weight, path, (!elsewhere).then_some(values));
        }
        if let Some(values) = self.head {
            model.linears_mut(&mut |path, linear| {
                if path == HEAD {
                    let own = (!linear.is_elsewhere()).then(|| values.clone());
                    changed |= replace(&mut linear.weight, path, own);
                }
            });
        }
        changed
    }
}

/// Replaces the values of the weight of the module at `path`, also of a packed one; returns true if they differ. Without
/// values another rank holds the weight; a packed placeholder is replaced by one of a float then.
fn replace<B: LinearKernels>(weight: &mut Weight<B>, path: &str, values: Option<TensorData>) -> bool {
    let values = match values {
        Some(values) => values,
        None if weight.is_packed() => TensorData::zeros::<f32, _>([1, 1]),
        None => return false,
    };
    let (device, dtype) = (weight.device(), if weight.is_packed() { DType::F32 } else { weight.val().dtype() });
    let new = Tensor::<B, 2>::from_data(values, (&device, dtype));
    if !weight.is_packed() && weight.val().into_data() == new.clone().into_data() {
        return false;
    }
    let trained = matches!(weight, Weight::Dense(param) if param.is_require_grad());
    *weight = Weight::dense(&format!("{path}.weight"), new);
    weight.map_dense(|values| values.detach().set_require_grad(trained));
    true
}
