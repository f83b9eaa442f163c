//! Which segments and parameters have gradients.

use super::TrainSegments;
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::AutodiffBackend},
};
use std::collections::HashMap;

/// Where gradients are needed.
pub(super) struct Plan {
    /// The first segment with a trainable parameter: from here on segments have graphs. The number of segments if none has.
    pub first: usize,
    /// For each trainable parameter the earliest segment that uses it.
    pub first_use: HashMap<ParamId, usize>,
}

impl Plan {
    pub fn new<B: AutodiffBackend, M: TrainSegments<B>>(model: &M) -> Self {
        let mut find = FindTrainable { segment: 0, first_use: HashMap::new() };
        for segment in 0..model.segments() {
            find.segment = segment;
            model.visit_segment(segment, &mut find);
        }
        let first = find.first_use.values().copied().min().unwrap_or(model.segments());
        Self { first, first_use: find.first_use }
    }
}

struct FindTrainable {
    segment: usize,
    first_use: HashMap<ParamId, usize>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for FindTrainable {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.val().is_require_grad() {
            self.first_use.entry(param.id).or_insert(self.segment);
        }
    }
}
