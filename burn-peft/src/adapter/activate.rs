//! Activating and deleting the named adapters of a model.

use super::{
    linears::Linears,
    merge::unmerge,
    registry::{check_exists, names_where},
};
use crate::{
    Error,
    error::{CHANGED_BASE, MERGED},
};
use burn_peft_kernels::LinearKernels;

/// Activates exactly the named adapters (none for an empty list) and deactivates all others: PEFT's `set_adapter`.
/// Merged adapters that are not named are unmerged. Nothing is freed: see [`delete`].
///
/// # Errors
/// If a name is unknown, if several are prompts, or if an adapter that changed the base model would become inactive.
pub fn activate<B: LinearKernels, M: Linears<B>>(model: &mut M, names: &[&str]) -> Result<(), Error> {
    names.iter().try_for_each(|name| check_exists(model, name))?;
    let named = |name: &String| names.contains(&name.as_str());
    if let Some(name) = names_where(model, |state| state.changes_base).into_iter().find(|name| !named(name)) {
        return Err(Error::adapter(&name, CHANGED_BASE));
    }
    let prompts: Vec<_> = model.prompts().iter().filter(|prompt| named(&prompt.name)).collect();
    if let [_, second, ..] = prompts[..] {
        let state = "is the second prompt: only one can be active, or one per row of a batch";
        return Err(Error::adapter(&second.name, state));
    }
    for name in names_where(model, |state| state.merged).into_iter().filter(|name| !named(name)) {
        unmerge(model, &name);
    }
    model.linears_mut(&mut |_, linear| {
        linear.adapters.iter_mut().for_each(|lora| lora.active = named(&lora.name));
        linear.ia3.iter_mut().for_each(|ia3| ia3.active = named(&ia3.name));
    });
    if let Some((_, embedding)) = model.embedding_mut() {
        embedding.adapters.iter_mut().for_each(|adapter| adapter.active = named(&adapter.name));
    }
    for prompt in model.prompts_mut().into_iter().flatten() {
        prompt.active = named(&prompt.name);
    }
    Ok(())
}

/// Deletes the named adapter and frees its memory.
///
/// # Errors
/// If the name is unknown, the adapter is merged, or it changed the base model; the model is then unchanged.
pub fn delete<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    check_exists(model, name)?;
    let is = |names: Vec<String>| names.iter().any(|other| other == name);
    if is(names_where(model, |state| state.merged)) {
        return Err(Error::adapter(name, MERGED));
    }
    if is(names_where(model, |state| state.changes_base)) {
        return Err(Error::adapter(name, CHANGED_BASE));
    }
    let mut result = Ok(());
    model.linears_mut(&mut |_, linear| {
        if result.is_ok() {
            result = linear.delete_adapter(name);
        }
    });
    if let (Ok(()), Some((_, embedding))) = (&result, model.embedding_mut()) {
        result = embedding.delete_adapter(name);
    }
    if let Some(prompts) = model.prompts_mut() {
        prompts.retain(|prompt| prompt.name != name);
    }
    result
}
