//! The plan of the backward pass: which segments and parameters need gradients.

use super::TrainSegments;
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::AutodiffBackend},
};
use std::{collections::HashMap, ops::Range};

/// The segments and parameters that need gradients.
pub(crate) struct BackwardPlan {
    /// The number of segments of the model.
    pub segments: usize,
    /// The first segment with a trainable parameter, from which on segments have graphs; the number of segments if
    /// there is none.
    pub first_trainable: usize,
    /// For each trainable parameter the segments that use it, ascending.
    uses: HashMap<ParamId, Vec<usize>>,
}

impl BackwardPlan {
    pub(crate) fn new<B: AutodiffBackend, M: TrainSegments<B>>(model: &M) -> Self {
        let mut find = UseVisitor { segment: 0, uses: HashMap::new() };
        for segment in 0..model.segments() {
            find.segment = segment;
            model.visit_segment(segment, &mut find);
        }
        let first = find.uses.values().map(|uses| uses[0]).min().unwrap_or(model.segments());
        Self { segments: model.segments(), first_trainable: first, uses: find.uses }
    }

    /// Returns the plan of a forward pass after which no backward pass follows.
    pub(crate) fn forward_only(segments: usize) -> Self {
        Self { segments, first_trainable: segments, uses: HashMap::new() }
    }

    /// Returns the first of these segments that uses a parameter; none if the parameter is frozen or used elsewhere.
    pub(super) fn first_use(&self, id: ParamId, segments: &Range<usize>) -> Option<usize> {
        self.uses.get(&id)?.iter().copied().find(|segment| segments.contains(segment))
    }
}

struct UseVisitor {
    segment: usize,
    uses: HashMap<ParamId, Vec<usize>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for UseVisitor {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.val().is_require_grad() {
            let uses = self.uses.entry(param.id).or_default();
            if uses.last() != Some(&self.segment) {
                uses.push(self.segment);
            }
        }
    }
}
