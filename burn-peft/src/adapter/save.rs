//! Saving adapters of any kind.

use super::{ia3::save_ia3, linears::Linears, lora::collect_state_dict, registry::check_exists};
use crate::{Error, format};
use burn::module::Module;
use burn_peft_kernels::LinearKernels;
use std::path::Path;

/// Every module that exposes its linear layers can save the adapters on them.
pub trait AdapterModel<B: LinearKernels>: Linears<B> + Module<B> {
    /// Writes the named adapter as a PEFT directory: a LoRA adapter (with the biases and modules that were trained
    /// along with it), an IA3 adapter or a prompt. The configuration is the one that it was attached or loaded with.
    ///
    /// # Errors
    /// If the model has no such adapter or the directory cannot be written.
    fn save_adapter(&self, name: &str, directory: &Path) -> Result<(), Error> {
        check_exists(self, name)?;
        if let Some(prompt) = self.prompts().iter().find(|prompt| prompt.name == name) {
            return prompt.save(directory);
        }
        let mut ia3 = None;
        self.linears(&mut |_, linear| {
            ia3 = ia3.take().or_else(|| Some(linear.ia3.iter().find(|ia3| ia3.name == name)?.config.clone()));
        });
        if let Some(config) = ia3 {
            return save_ia3(self, name, &config, directory);
        }
        let files = collect_state_dict(self, name)?;
        format::write(directory, &files.config.to_json(), files.tensors)
    }
}

impl<B: LinearKernels, M: Linears<B> + Module<B>> AdapterModel<B> for M {}
