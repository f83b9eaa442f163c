//! The plan of the backward pass: which segments and parameters need gradients.

use super::TrainSegments;
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::AutodiffBackend},
};
use std::collections::HashMap;

/// The segments and parameters that need gradients.
pub(super) struct BackwardPlan {
    /// The first segment with a trainable parameter, from which on segments have graphs; the number of segments if
    /// there is none.
    pub first_trainable: usize,
    /// For each trainable parameter the first segment that uses it.
    pub first_use: HashMap<ParamId, usize>,
}

impl BackwardPlan {
    pub(super) fn new<B: AutodiffBackend, M: TrainSegments<B>>(model: &M) -> Self {
        let mut find = FirstUseVisitor { segment: 0, first_use: HashMap::new() };
        for segment in 0..model.segments() {
            find.segment = segment;
            model.visit_segment(segment, &mut find);
        }
        let first = find.first_use.values().copied().min().unwrap_or(model.segments());
        Self { first_trainable: first, first_use: find.first_use }
    }
}

struct FirstUseVisitor {
    segment: usize,
    first_use: HashMap<ParamId, usize>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for FirstUseVisitor {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.val().is_require_grad() {
            self.first_use.entry(param.id).or_insert(self.segment);
        }
    }
}
