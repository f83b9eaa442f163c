//! Several adapters of any kind on one model, told apart by their names.

use super::Linears;
use crate::{Error, kernel::LinearKernels, route::BASE};

/// The names of all adapters, in the order in which a layer first shows them; those of prompts last.
pub fn names<B: LinearKernels, M: Linears<B>>(model: &M) -> Vec<String> {
    select(model, |_| true)
}

/// The names of the adapters that act in a pass that does not name any.
pub fn active<B: LinearKernels, M: Linears<B>>(model: &M) -> Vec<String> {
    select(model, |state| state.active)
}

/// What holds for an adapter on one layer, or for a prompt.
struct State {
    active: bool,
    merged: bool,
    changes_base: bool,
}

fn select<B: LinearKernels, M: Linears<B>>(model: &M, wanted: impl Fn(&State) -> bool) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut see = |name: &str, state: State| {
        if wanted(&state) && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    };
    model.linears(&mut |_, linear| {
        for lora in &linear.adapters {
            let (active, merged, changes_base) = (lora.active, lora.merged, lora.changes_base);
            see(&lora.name, State { active, merged, changes_base });
        }
        for ia3 in &linear.ia3 {
            see(&ia3.name, State { active: ia3.active, merged: ia3.merged, changes_base: false });
        }
    });
    for prompt in model.prompts() {
        see(&prompt.name, State { active: prompt.active, merged: false, changes_base: false });
    }
    names
}

/// An error if no adapter has that name.
pub(super) fn known<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Result<(), Error> {
    let names = names(model);
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(Error::Unknown { name: name.to_owned(), known })
}

/// An error if an adapter cannot come onto the model under that name. One that `changes_base` wants the model for itself: what it
/// leaves of the base is not what other adapters were made for.
///
/// # Errors
/// That error.
pub fn admit<B: LinearKernels, M: Linears<B>>(model: &M, name: &str, changes_base: bool) -> Result<(), Error> {
    let names = names(model);
    let refuse = |state| Err(Error::Name { name: name.to_owned(), state });
    if name == BASE {
        return refuse("cannot be: this name means no adapter; choose another");
    }
    if names.iter().any(|known| known == name) {
        return refuse("exists already; choose another name or delete it");
    }
    if !select(model, |state| state.changes_base).is_empty() || (changes_base && !names.is_empty()) {
        return refuse(
            "cannot share the model: an adapter with bias, modules_to_save or a start from the weights (PiSSA, OLoRA) changes the base \
             model itself; give it a model of its own, or convert it to plain LoRA",
        );
    }
    Ok(())
}

/// Lets exactly the named adapters act; none for an empty list. Adapters that are merged and not named are taken out of the
/// weights again. Nothing is freed: see [`delete`].
///
/// # Errors
/// If a name is unknown, if several are prompts, or if an adapter that changed the base model would be left out.
pub fn activate<B: LinearKernels, M: Linears<B>>(model: &mut M, names: &[&str]) -> Result<(), Error> {
    names.iter().try_for_each(|name| known(model, name))?;
    let named = |name: &String| names.contains(&name.as_str());
    if let Some(name) = select(model, |state| state.changes_base).into_iter().find(|name| !named(name)) {
        let state = "changed the base model itself, which is not kept: load the model again without it";
        return Err(Error::Name { name, state });
    }
    let prompts: Vec<_> = model.prompts().iter().filter(|prompt| named(&prompt.name)).collect();
    if let [_, second, ..] = prompts[..] {
        let state = "is the second prompt: only one can be active, or one per row of a batch";
        return Err(Error::Name { name: second.name.clone(), state });
    }
    for name in select(model, |state| state.merged).into_iter().filter(|name| !named(name)) {
        super::unmerge(model, &name);
    }
    model.linears_mut(&mut |_, linear| {
        linear.adapters.iter_mut().for_each(|lora| lora.active = named(&lora.name));
        linear.ia3.iter_mut().for_each(|ia3| ia3.active = named(&ia3.name));
    });
    for prompt in model.prompts_mut().into_iter().flatten() {
        prompt.active = named(&prompt.name);
    }
    Ok(())
}

/// Removes the named adapter and frees what it holds.
///
/// # Errors
/// If the name is unknown, the adapter is merged, or it changed the base model; then nothing has changed.
pub fn delete<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    known(model, name)?;
    let refuse = |state| Err(Error::Name { name: name.to_owned(), state });
    let is = |names: Vec<String>| names.iter().any(|other| other == name);
    if is(select(model, |state| state.merged)) {
        return refuse("is merged into the weights; unmerge it first");
    }
    if is(select(model, |state| state.changes_base)) {
        return refuse("changed the base model itself, which is not kept: load the model again without it");
    }
    let mut result = Ok(());
    model.linears_mut(&mut |_, linear| {
        if result.is_ok() {
            result = linear.detach(name);
        }
    });
    if let Some(prompts) = model.prompts_mut() {
        prompts.retain(|prompt| prompt.name != name);
    }
    result
}

/// An error if rows cannot have these adapters in one batch: there must be a name for every row, of an adapter of the model or
/// [`BASE`], and no adapter may be in the weights or have changed them.
///
/// # Errors
/// That error.
pub fn check_rows<B: LinearKernels, M: Linears<B>, S: AsRef<str>>(
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
    names.iter().map(AsRef::as_ref).filter(|name| *name != BASE).try_for_each(|name| known(model, name))?;
    if let Some(name) = select(model, |state| state.merged).into_iter().next() {
        return Err(Error::Name { name, state: "is merged into the weights, which all rows share; unmerge it first" });
    }
    let changed = select(model, |state| state.changes_base).into_iter();
    match changed.into_iter().next().filter(|changed| names.iter().any(|name| name.as_ref() != changed)) {
        Some(name) => {
            Err(Error::Name { name, state: "changed the base model, which all rows share; convert it to plain LoRA" })
        }
        None => Ok(()),
    }
}
