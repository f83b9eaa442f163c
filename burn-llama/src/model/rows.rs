//! Which adapters act on which rows of a batch.

use super::Llama;
use crate::{Error, kernel::Kernels};
use burn_peft::{Pass, Prompt, Route, adapter, prompt::Place};
use std::{collections::BTreeSet, ops::Range};

/// For every row the prompt that it begins with, and the adapter that it names if rows do that.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    prompts: Vec<Option<usize>>,
    names: Option<Vec<String>>,
}

impl<B: Kernels> Llama<B> {
    /// Rows on which the active adapters act.
    pub(crate) fn active_rows(&self, rows: usize) -> Rows {
        Rows { prompts: vec![self.prompts.iter().position(|prompt| prompt.active); rows], names: None }
    }

    /// Rows each with an adapter by name.
    ///
    /// # Errors
    /// As [`adapter::check_rows`].
    pub(crate) fn named_rows<S: AsRef<str>>(&self, names: &[S], rows: usize) -> Result<Rows, Error> {
        adapter::check_rows(self, names, rows)?;
        let prompt = |name: &S| self.prompts.iter().position(|prompt| prompt.name == name.as_ref());
        let owned = names.iter().map(|name| name.as_ref().to_owned()).collect();
        Ok(Rows { prompts: names.iter().map(prompt).collect(), names: Some(owned) })
    }
}

impl Rows {
    /// The pass of rows of `length` slots.
    pub fn pass(&self, length: usize) -> Pass {
        self.names.as_ref().map_or_else(Pass::default, |names| Pass::routed(Route::rows(names, length)))
    }

    /// Whether each names an adapter of its own.
    pub fn are_named(&self) -> bool {
        self.names.is_some()
    }

    /// The prompts that occur, in the model's order.
    fn used(&self) -> BTreeSet<usize> {
        self.prompts.iter().flatten().copied().collect()
    }

    /// The prompts that occur, in the model's order.
    pub fn prompts<'a, B: Kernels>(&self, model: &'a Llama<B>) -> impl Iterator<Item = &'a Prompt<B>> {
        self.used().into_iter().map(|index| &model.prompts[index])
    }

    /// For every row its virtual tokens among those of all prompts that act at `place`.
    pub fn ranges<B: Kernels>(&self, model: &Llama<B>, place: Place) -> Vec<Range<usize>> {
        let (mut ranges, mut end) = (vec![0..0; model.prompts.len()], 0);
        for index in self.used().into_iter().filter(|&index| model.prompts[index].place() == place) {
            let start = end;
            end += model.prompts[index].num_virtual_tokens();
            ranges[index] = start..end;
        }
        self.prompts.iter().map(|prompt| prompt.map_or(0..0, |index| ranges[index].clone())).collect()
    }

    /// For every row the number of its virtual tokens.
    pub fn virtual_tokens<B: Kernels>(&self, model: &Llama<B>) -> Vec<usize> {
        let number = |prompt: &Option<usize>| prompt.map_or(0, |index| model.prompts[index].num_virtual_tokens());
        self.prompts.iter().map(number).collect()
    }
}
