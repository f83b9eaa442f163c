//! The named adapters of a model, of any kind: listing and checking them.

use super::linears::Linears;
use crate::{Error, route::BASE};
use burn_peft_kernels::LinearKernels;

/// Returns the names of all adapters, in the order of their first appearance on a layer; those of prompts come last.
pub fn names<B: LinearKernels, M: Linears<B>>(model: &M) -> Vec<String> {
    names_where(model, |_| true)
}

/// Returns the names of the active adapters: those that a forward pass without a [`Route`](crate::Route) applies.
pub fn active<B: LinearKernels, M: Linears<B>>(model: &M) -> Vec<String> {
    names_where(model, |state| state.active)
}

/// The state of an adapter on one layer, or of a prompt.
pub(super) struct AdapterState {
    pub active: bool,
    pub merged: bool,
    pub changes_base: bool,
}

/// Returns the names of the adapters of which at least one layer's state is `wanted`.
pub(super) fn names_where<B: LinearKernels, M: Linears<B>>(
    model: &M,
    wanted: impl Fn(&AdapterState) -> bool,
) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut see = |name: &str, state: AdapterState| {
        if wanted(&state) && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    };
    model.linears(&mut |_, linear| {
        for lora in &linear.adapters {
            let (active, merged, changes_base) = (lora.active, lora.merged, lora.config.changes_base());
            see(&lora.name, AdapterState { active, merged, changes_base });
        }
        for ia3 in &linear.ia3 {
            see(&ia3.name, AdapterState { active: ia3.active, merged: ia3.merged, changes_base: false });
        }
    });
    for adapter in model.embedding().iter().flat_map(|(_, embedding)| &embedding.adapters) {
        let (active, merged, changes_base) = (adapter.active, adapter.merged, adapter.config.changes_base());
        see(&adapter.name, AdapterState { active, merged, changes_base });
    }
    for prompt in model.prompts() {
        see(&prompt.name, AdapterState { active: prompt.active, merged: false, changes_base: false });
    }
    names
}

/// Returns an error if the model has no adapter of that name.
pub(super) fn check_exists<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Result<(), Error> {
    let names = names(model);
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(Error::UnknownAdapter { name: name.to_owned(), known })
}

/// Checks that a new adapter of that name can be added. An adapter that `changes_base` must be the only one of the
/// model: other adapters were not trained for the changed base.
///
/// # Errors
/// If the name is taken or reserved, or the adapter cannot share the model with others.
pub fn check_new_adapter<B: LinearKernels, M: Linears<B>>(
    model: &M,
    name: &str,
    changes_base: bool,
) -> Result<(), Error> {
    let names = names(model);
    let refuse = |state| Err(Error::adapter(name, state));
    if name == BASE {
        return refuse("is a reserved name that stands for no adapter; choose another");
    }
    if names.iter().any(|known| known == name) {
        return refuse("exists already; choose another name or delete it");
    }
    if !names_where(model, |state| state.changes_base).is_empty() || (changes_base && !names.is_empty()) {
        return refuse(
            "cannot share the model: an adapter with bias, modules_to_save or an initialization that changes the \
             weights (PiSSA, OLoRA) needs a base model of its own; load one for it, or convert it to plain LoRA",
        );
    }
    Ok(())
}

/// Checks PEFT's `adapter_names` of a batch with an adapter per row: every row needs the name of an adapter of the
/// model or [`BASE`], and no adapter may be merged or have changed the base model.
///
/// # Errors
/// If one of these conditions does not hold.
pub fn check_adapter_names<B: LinearKernels, M: Linears<B>, S: AsRef<str>>(
    model: &M,
    names: &[S],
    rows: usize,
) -> Result<(), Error> {
    if names.len() != rows {
        let found = names.len();
        return Err(Error::config(format!(
            "adapters of a batch: expected one name for each of {rows} rows, found {found}"
        )));
    }
    names.iter().map(AsRef::as_ref).filter(|name| *name != BASE).try_for_each(|name| check_exists(model, name))?;
    if let Some(name) = names_where(model, |state| state.merged).into_iter().next() {
        return Err(Error::adapter(&name, "is merged into the weights, which all rows share; unmerge it first"));
    }
    let changed = names_where(model, |state| state.changes_base).into_iter();
    match changed.into_iter().next().filter(|changed| names.iter().any(|name| name.as_ref() != changed)) {
        Some(name) => {
            Err(Error::adapter(&name, "changed the base model, which all rows share; convert it to plain LoRA"))
        }
        None => Ok(()),
    }
}
