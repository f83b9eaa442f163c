//! The routing of tokens to adapters, with which each row of a batch can use a different adapter.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_peft_kernels::{LinearKernels, add};
use std::{collections::BTreeMap, sync::Arc};

/// The name that selects the base model without an adapter, as in PEFT's `adapter_names`.
pub const BASE: &str = "__base__";

/// The tokens to which each adapter applies. An adapter without tokens is not applied, even if it is active.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    tokens: usize,
    by_name: Arc<BTreeMap<String, Vec<i32>>>,
}

impl Route {
    /// Creates the route of rows of `length` tokens that use the adapters of the given names, or none ([`BASE`]).
    pub fn from_adapter_names<S: AsRef<str>>(names: &[S], length: usize) -> Self {
        let mut by_name = BTreeMap::<String, Vec<i32>>::new();
        for (row, name) in names.iter().enumerate().filter(|(_, name)| name.as_ref() != BASE) {
            let tokens = (row * length) as i32..((row + 1) * length) as i32;
            by_name.entry(name.as_ref().to_owned()).or_default().extend(tokens);
        }
        Self { tokens: names.len() * length, by_name: Arc::new(by_name) }
    }

    /// Returns the route of a subset of the tokens, given by their positions.
    pub(crate) fn select(&self, places: &[i32]) -> Self {
        let moved = |tokens: &Vec<i32>| {
            let acts = |(_, place): &(usize, &i32)| tokens.binary_search(place).is_ok();
            places.iter().enumerate().filter(acts).map(|(new, _)| new as i32).collect::<Vec<_>>()
        };
        let by_name = self.by_name.iter().map(|(name, tokens)| (name.clone(), moved(tokens)));
        let by_name = by_name.filter(|(_, tokens)| !tokens.is_empty()).collect();
        Self { tokens: places.len(), by_name: Arc::new(by_name) }
    }

    /// Returns the selection of an activation's `tokens` to which the named adapter applies, if any.
    ///
    /// # Panics
    /// If the activation has a different number of tokens than the route.
    pub(crate) fn token_selection(&self, name: &str, tokens: usize) -> Option<TokenSelection<'_>> {
        assert_eq!(tokens, self.tokens, "the activation and the route have different numbers of tokens");
        let at = self.by_name.get(name)?;
        Some(TokenSelection((at.len() < self.tokens).then_some(at)))
    }
}

/// The tokens to which an adapter applies: all, or those at the given positions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenSelection<'a>(Option<&'a [i32]>);

impl TokenSelection<'_> {
    /// Selects every token.
    pub(crate) const ALL: Self = Self(None);

    /// Returns the selected tokens of `x [tokens, features]`.
    pub(crate) fn gather<B: LinearKernels>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.0 {
            None => x,
            Some(at) => {
                let indices = index_tensor(at, &x.device());
                x.select(0, indices)
            }
        }
    }

    /// Returns 1 for the selected and 0 for the other tokens, `[tokens, 1]`; `None` if all are selected.
    pub(crate) fn row_mask<B: LinearKernels>(&self, tokens: usize, device: &B::Device) -> Option<Tensor<B, 2>> {
        let mut mask = vec![0f32; tokens];
        self.0?.iter().for_each(|&at| mask[at as usize] = 1.0);
        Some(Tensor::from_data(TensorData::new(mask, [tokens, 1]), (device, DType::F32)))
    }

    /// Adds `added` to the selected tokens of `y [tokens, features]`.
    pub(crate) fn scatter_add<B: LinearKernels>(&self, y: Tensor<B, 2>, added: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.0 {
            None => add(y, added),
            Some(at) => {
                let indices = index_tensor(at, &y.device());
                y.select_assign(0, indices, added, IndexingUpdateOp::Add)
            }
        }
    }
}

fn index_tensor<B: LinearKernels>(at: &[i32], device: &B::Device) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(at.to_vec(), [at.len()]), (device, DType::I32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selecting_tokens_selects_their_adapters() {
        let route = Route::from_adapter_names(&["a", BASE, "b"], 3).select(&[7, 1, 4]);
        let at = |name: &str| route.token_selection(name, 3).map(|reach| reach.0.map(<[i32]>::to_vec));
        assert_eq!(at("a"), Some(Some(vec![1])));
        assert_eq!(at("b"), Some(Some(vec![0])));
        assert_eq!(at("c"), None);
        assert!(
            Route::from_adapter_names(&["a", "b"], 2).select(&[2, 3]).token_selection("b", 2)
                == Some(TokenSelection::ALL)
        );
    }
}
