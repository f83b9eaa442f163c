//! Which adapters act on which tokens of a pass: rows of one batch may each have their own.

use crate::kernel::{self, LinearKernels};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use std::{collections::BTreeMap, sync::Arc};

/// The name of no adapter, PEFT's.
pub const BASE: &str = "__base__";

/// For every adapter the tokens on which it acts. An adapter without tokens does nothing, active or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    tokens: usize,
    by_name: Arc<BTreeMap<String, Vec<i32>>>,
}

impl Route {
    /// Rows of `length` tokens, each with the adapter that it names, or with none ([`BASE`]).
    pub fn rows<S: AsRef<str>>(names: &[S], length: usize) -> Self {
        let mut by_name = BTreeMap::<String, Vec<i32>>::new();
        for (row, name) in names.iter().enumerate().filter(|(_, name)| name.as_ref() != BASE) {
            let tokens = (row * length) as i32..((row + 1) * length) as i32;
            by_name.entry(name.as_ref().to_owned()).or_default().extend(tokens);
        }
        Self { tokens: names.len() * length, by_name: Arc::new(by_name) }
    }

    /// The route of some of its tokens.
    pub(crate) fn at(&self, places: &[i32]) -> Self {
        let moved = |tokens: &Vec<i32>| {
            let acts = |(_, place): &(usize, &i32)| tokens.binary_search(place).is_ok();
            places.iter().enumerate().filter(acts).map(|(new, _)| new as i32).collect::<Vec<_>>()
        };
        let by_name = self.by_name.iter().map(|(name, tokens)| (name.clone(), moved(tokens)));
        let by_name = by_name.filter(|(_, tokens)| !tokens.is_empty()).collect();
        Self { tokens: places.len(), by_name: Arc::new(by_name) }
    }

    /// The tokens of the named adapter among the `tokens` of an activation; `None` if there are none.
    ///
    /// # Panics
    /// If the activation is not the one that the route was made for.
    pub(crate) fn reach(&self, name: &str, tokens: usize) -> Option<Reach<'_>> {
        assert_eq!(tokens, self.tokens, "the tokens of a pass and those of its route");
        let at = self.by_name.get(name)?;
        Some(Reach((at.len() < self.tokens).then_some(at)))
    }
}

/// The tokens on which an adapter acts: all of them, or those at some places.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reach<'a>(Option<&'a [i32]>);

impl Reach<'_> {
    /// Every token.
    pub const ALL: Self = Self(None);

    /// The tokens of `x [tokens, features]` that are meant.
    pub fn take<B: LinearKernels>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.0 {
            None => x,
            Some(at) => {
                let indices = places(at, &x.device());
                x.select(0, indices)
            }
        }
    }

    /// `y [tokens, features]` with `added` at the tokens that are meant.
    pub fn add<B: LinearKernels>(&self, y: Tensor<B, 2>, added: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.0 {
            None => kernel::add(y, added),
            Some(at) => {
                let indices = places(at, &y.device());
                y.select_assign(0, indices, added, IndexingUpdateOp::Add)
            }
        }
    }
}

fn places<B: LinearKernels>(at: &[i32], device: &B::Device) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(at.to_vec(), [at.len()]), (device, DType::I32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_pass_has_its_part_of_the_route() {
        let route = Route::rows(&["a", BASE, "b"], 3).at(&[7, 1, 4]);
        let at = |name: &str| route.reach(name, 3).map(|reach| reach.0.map(<[i32]>::to_vec));
        assert_eq!(at("a"), Some(Some(vec![1])));
        assert_eq!(at("b"), Some(Some(vec![0])));
        assert_eq!(at("c"), None);
        assert!(Route::rows(&["a", "b"], 2).at(&[2, 3]).reach("b", 2) == Some(Reach::ALL));
    }
}
