//! Adapters in the weights, and out of them again.

use super::{Linears, all, several::known};
use crate::{Error, kernel::LinearKernels};

/// Merges the named adapter into the weights of its layers; merging twice is merging once. Several adapters may be merged, one
/// after the other.
///
/// # Errors
/// If the model has no such adapter, it is a prompt, or one of the weights is packed; then nothing has changed.
pub fn merge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    known(model, name)?;
    if model.prompts().iter().any(|prompt| prompt.name == name) {
        let state = "is a prompt: virtual tokens cannot be merged into weights; keep it beside the model";
        return Err(Error::Name { name: name.to_owned(), state });
    }
    all(model, |_, linear| linear.mergeable(name))?;
    let mut result = Ok(());
    model.linears_mut(&mut |_, linear| {
        if result.is_ok() {
            result = linear.merge(name);
        }
    });
    result
}

/// As [`merge`], after a look at every number that it would write. The look costs one more product `B·A` per layer.
///
/// # Errors
/// As [`merge`], and if a number is not finite; then, too, nothing has changed.
pub fn safe_merge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) -> Result<(), Error> {
    all(model, |path, linear| match linear.is_finite(name) {
        true => Ok(()),
        false => Err(Error::NotFinite { name: name.to_owned(), layer: path.to_owned() }),
    })?;
    merge(model, name)
}

/// Undoes [`merge`], up to rounding.
pub fn unmerge<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) {
    model.linears_mut(&mut |_, linear| linear.unmerge(name));
}
