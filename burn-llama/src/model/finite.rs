//! The check of results for NaN and infinities.

use super::Llama;
use crate::{Error, kernel::Kernels};

impl<B: Kernels> Llama<B> {
    /// Returns an error if a `result` of the model, such as `loss`, is not `finite`. It names the tensor that holds
    /// values that are not finite, which are searched for only then.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the result is not finite.
    pub fn check_finite(&self, result: &'static str, finite: bool) -> Result<(), Error> {
        if finite {
            return Ok(());
        }
        let cause = burn_peft::adapter::find_not_finite(self).map_or_else(
            || "no tensor in floats holds them, so the computation overflows; compute in f32".to_owned(),
            |tensor| format!("{tensor} holds them; use another file of it"),
        );
        Err(Error::NotFinite { result, cause })
    }
}
