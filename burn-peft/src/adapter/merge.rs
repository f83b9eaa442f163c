//! Merges adapters into the weights and unmerges them.

use super::{
    linears::{Linears, check_layers},
    registry::check_exists,
};
use crate::Error;
use burn_peft_kernels::LinearKernels;

/// Merges the named adapter into the weights of its layers; merging a merged adapter does nothing. Several adapters may
/// be merged, one after the other.
///
/// # Errors
/// If the model has no such adapter, it is a prompt, or one of the weights is packed; the model is then unchanged.
pub fn merge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    check_exists(model, name)?;
    if model.prompts().iter().any(|prompt| prompt.name == name) {
        let state = "is a prompt: virtual tokens cannot be merged into weights; keep it beside the model";
        return Err(Error::adapter(name, state));
    }
    check_layers(model, |_, linear| linear.check_mergeable(name))?;
    if let Some((_, embedding)) = model.embedding()
        && let Some(adapter) = embedding.adapter(name)
    {
        embedding.weight.check_writable("merging an adapter")?;
        if adapter.unties_by_merging() {
            model.untie();
        }
    }
    let mut result = Ok(());
    model.linears_mut(&mut |_, linear| {
        if result.is_ok() {
            result = linear.merge(name);
        }
    });
    if let (Ok(()), Some((_, embedding))) = (&result, model.embedding_mut()) {
        embedding.set_merged(name, true);
    }
    result
}

/// Does the same as [`merge`] after checking that all values it would add are finite: PEFT's `safe_merge`. The check
/// costs one more product `B·A` per layer.
///
/// # Errors
/// As for [`merge`], and if a value is not finite; the model is then unchanged.
pub fn safe_merge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    check_layers(model, |path, linear| match linear.is_delta_finite(name) {
        true => Ok(()),
        false => Err(Error::NotFinite { name: name.to_owned(), layer: path.to_owned() }),
    })?;
    if let Some((path, embedding)) = model.embedding()
        && embedding.adapter(name).is_some_and(|adapter| !adapter.is_finite())
    {
        return Err(Error::NotFinite { name: name.to_owned(), layer: path.to_owned() });
    }
    merge(model, name)
}

/// Undoes [`merge`], up to rounding.
pub fn unmerge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) {
    model.linears_mut(&mut |_, linear| linear.unmerge(name));
    if let Some((_, embedding)) = model.embedding_mut() {
        embedding.set_merged(name, false);
    }
}
