//! The adapters and prompts of each row of a batch.

use super::Llama;
use crate::{Error, kernel::Kernels};
use burn_peft::{ForwardContext, Prompt, Route, adapter, prompt::Injection};
use std::{collections::BTreeSet, ops::Range};

/// The prompt of every row, and the name of its adapter if rows name adapters.
#[derive(Debug, Clone)]
pub(crate) struct RowAdapters {
    prompts: Vec<Option<usize>>,
    adapter_names: Option<Vec<String>>,
}

impl<B: Kernels> Llama<B> {
    /// Returns rows that all use the active adapters and prompt.
    pub(crate) fn active_row_adapters(&self, rows: usize) -> RowAdapters {
        RowAdapters { prompts: vec![self.prompts.iter().position(|prompt| prompt.active); rows], adapter_names: None }
    }

    /// Returns rows that each use the adapter or prompt of a name.
    ///
    /// # Errors
    /// Returns the errors of [`adapter::check_adapter_names`].
    pub(crate) fn named_row_adapters<S: AsRef<str>>(&self, names: &[S], rows: usize) -> Result<RowAdapters, Error> {
        adapter::check_adapter_names(self, names, rows)?;
        let prompt = |name: &S| self.prompts.iter().position(|prompt| prompt.name == name.as_ref());
        let owned = names.iter().map(|name| name.as_ref().to_owned()).collect();
        Ok(RowAdapters { prompts: names.iter().map(prompt).collect(), adapter_names: Some(owned) })
    }
}

impl RowAdapters {
    /// Returns the forward context of rows of `length` slots.
    pub(crate) fn forward_context(&self, length: usize) -> ForwardContext {
        self.adapter_names.as_ref().map_or_else(ForwardContext::default, |names| {
            ForwardContext::routed(Route::from_adapter_names(names, length))
        })
    }

    /// Returns true if each row names its adapter.
    pub(crate) fn has_names(&self) -> bool {
        self.adapter_names.is_some()
    }

    /// Returns the indices of the prompts in use, in the model's order.
    fn used_prompts(&self) -> BTreeSet<usize> {
        self.prompts.iter().flatten().copied().collect()
    }

    /// Returns the prompts in use, in the model's order.
    pub(crate) fn prompts<'a, B: Kernels>(&self, model: &'a Llama<B>) -> impl Iterator<Item = &'a Prompt<B>> {
        self.used_prompts().into_iter().map(|index| &model.prompts[index])
    }

    /// Returns the virtual tokens of every row, as a range of those of all prompts in use that act at `place`.
    pub(crate) fn virtual_token_ranges<B: Kernels>(&self, model: &Llama<B>, place: Injection) -> Vec<Range<usize>> {
        let (mut ranges, mut end) = (vec![0..0; model.prompts.len()], 0);
        for index in self.used_prompts().into_iter().filter(|&index| model.prompts[index].injection() == place) {
            let start = end;
            end += model.prompts[index].num_virtual_tokens();
            ranges[index] = start..end;
        }
        self.prompts.iter().map(|prompt| prompt.map_or(0..0, |index| ranges[index].clone())).collect()
    }

    /// Returns the number of virtual tokens of every row.
    pub(crate) fn num_virtual_tokens<B: Kernels>(&self, model: &Llama<B>) -> Vec<usize> {
        let number = |prompt: &Option<usize>| prompt.map_or(0, |index| model.prompts[index].num_virtual_tokens());
        self.prompts.iter().map(number).collect()
    }
}
