//! Parameters that several ranks of a pipeline use, such as an embedding that is also the head. The first of these ranks
//! updates the parameter: at the end of a step it gets the gradients of the others, and sends the new values back. So it
//! has one set of optimizer states, and it counts once in the norm and in the files.

use super::{Engine, ShardingState, forward_backward::reduces_in_backward, stages::PipelineAxis};
use crate::{
    Error,
    gather::PutParams,
    pipeline::{P2p, P2pValue},
    segment::{DynTensor, Gradient, TrainSegments},
    sharding::ShardLayout,
};
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::AutodiffBackend},
};
use std::collections::HashMap;

/// A trainable parameter that several ranks of the pipeline use.
pub(super) struct TiedParameter {
    /// The index of the parameter in the layout.
    index: usize,
    /// The rank that updates it.
    owner: usize,
    /// The other ranks that use it, ascending.
    users: Vec<usize>,
}

impl PipelineAxis {
    /// Returns the trainable parameters that several ranks use.
    pub(super) fn tied_parameters(&self, layout: &ShardLayout) -> Vec<TiedParameter> {
        let tied = layout.parameters.iter().enumerate().filter(|(_, parameter)| parameter.trainable);
        let tied = tied.map(|(index, parameter)| {
            let mut users: Vec<usize> = parameter.segments.iter().map(|&segment| self.rank_of(segment)).collect();
            let owner = users[0];
            users.sort_unstable();
            users.dedup();
            users.retain(|&rank| rank != owner);
            TiedParameter { index, owner, users }
        });
        tied.filter(|tied| !tied.users.is_empty()).collect()
    }
}

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Adds the gradients of all ranks that use a tied parameter, on the rank that updates it.
    pub(super) fn reduce_tied_gradients(&mut self) -> Result<(), Error> {
        let Self { settings, communicator, pipeline, sharded, states, .. } = self;
        let ShardingState { layout, device, reducer, tied, .. } = sharded;
        let mut p2p = P2p::new(&pipeline.communicator);
        for TiedParameter { index, owner, users } in tied.iter() {
            if users.contains(&pipeline.rank()) {
                let value = P2pValue { tensor: reducer.take_unreduced(*index), requires_grad: false };
                p2p.send(*owner, vec![value])?;
            } else if *owner == pipeline.rank() {
                for &user in users {
                    let mut received = p2p.recv(user)?.wait(device)?;
                    let parameter = &layout.parameters[*index];
                    let value = received.pop().and_then(|value| value.tensor);
                    let gradient = |value| Gradient { path: parameter.path.clone(), id: parameter.id, value };
                    reducer.accumulate(layout, value.into_iter().map(gradient).collect());
                }
                if reduces_in_backward(settings.sharding.stage, communicator, states.host.is_some()) {
                    let bucket = layout.buckets.iter().position(|bucket| bucket.parameters().any(|own| own == *index));
                    bucket.map_or(Ok(()), |bucket| reducer.reduce(layout, bucket, communicator))?;
                }
            }
        }
        p2p.finish()
    }

    /// Sends the updated tied parameters to the other ranks that use them.
    pub(super) fn send_tied_weights(&mut self) -> Result<(), Error> {
        let Self { model, pipeline, sharded, .. } = self;
        let ShardingState { layout, device, tied, .. } = sharded;
        let (mut p2p, mut values) = (P2p::new(&pipeline.communicator), HashMap::new());
        for TiedParameter { index, owner, users } in tied.iter() {
            let id = layout.parameters[*index].id;
            if *owner == pipeline.rank() {
                let mut find = FindParameter { id, value: None };
                model.visit(&mut find);
                for &user in users {
                    p2p.send(user, vec![P2pValue { tensor: find.value.clone(), requires_grad: false }])?;
                }
            } else if users.contains(&pipeline.rank()) {
                let value = p2p.recv(*owner)?.wait(device)?.pop().and_then(|value| value.tensor);
                values.extend(value.map(|value| (id, value)));
            }
        }
        if !values.is_empty() {
            *model = model.clone().map(&mut PutParams { values });
        }
        p2p.finish()
    }
}

/// Finds the value of a parameter.
struct FindParameter<B: AutodiffBackend> {
    id: ParamId,
    value: Option<DynTensor<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for FindParameter<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.id == self.id {
            self.value = Some(DynTensor::new(param.val().inner()));
        }
    }
}
