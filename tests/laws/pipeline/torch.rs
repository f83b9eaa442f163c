//! A pipeline against torch.distributed.pipelining, by the fixture of `tests/fixtures/make_pipeline.py`.

use super::*;
use burn::tensor::DType;
use burn_llama::Checkpoint;
use laws::{fixture, integers, tensors};

const ROWS: usize = 2;
const LENGTH: usize = 12;

/// Builds the micro-batches of the fixture, with the weights of its loss: the mean over all targets of the step.
fn fixture_batches(model: &Llama<Train>, ids: &[u32]) -> Vec<Batch<Train>> {
    let micro_batches: Vec<&[u32]> = ids.chunks(ROWS * (LENGTH + 1)).collect();
    let weight = 1.0 / (micro_batches.len() * ROWS * LENGTH) as f32;
    let example = |ids: &[u32]| Example { ids: ids.to_vec(), loss_mask: (0..ids.len()).map(|i| i > 0).collect() };
    let batch = |micro_batch: &[u32]| {
        let rows: Vec<Example> = micro_batch.chunks(LENGTH + 1).map(example).collect();
        let layout = SequenceLayout::from_lengths(&[LENGTH + 1; ROWS], true);
        model.batch(&rows, &layout, weight, ForwardContext::default()).unwrap()
    };
    micro_batches.into_iter().map(batch).collect()
}

#[test]
fn losses_and_gradients_are_those_of_torch_between_four_processes() {
    let _lock = one_backward_at_a_time();
    let torch = tensors("pipeline/torch.safetensors");
    let ids: Vec<u32> = integers(&torch["ids"]).into_iter().map(|id| id as u32).collect();
    for (kind, chunks) in [(PipelineKind::OneFOneB, 1), (PipelineKind::ZBV, 2)] {
        let expected = |name: &str| floats(&torch[&format!("{kind}.{name}")]);
        let found = threads::run(4, |group| {
            let checkpoint = Checkpoint::open(&fixture("pipeline")).unwrap();
            let model: Llama<Train> = checkpoint.load(DType::F32, &Default::default()).unwrap();
            let batches = fixture_batches(&model, &ids);
            let segments = PartitionMethod::Uniform.split(&[1; 2 * 8 + 2], 4 * chunks).unwrap();
            let pipeline = PipelineConfig { ranks: 4, kind, chunks, segments };
            let config = config(Checkpointing::None).with_communicator(Box::new(group)).with_pipeline(pipeline);
            let mut engine = config.init(model).unwrap();
            let one = |batch: &Batch<Train>| engine.losses(std::slice::from_ref(batch)).unwrap();
            let losses: Vec<f64> = batches.iter().map(one).collect();
            let losses = engine.sum_over_ranks(&losses).unwrap();
            engine.forward_backward(&batches).unwrap();
            let gradients = engine.gradients().into_iter();
            let gradients = gradients.map(|found| (found.path, floats(&found.value.flatten().into_data())));
            (losses, gradients.collect::<Values>())
        });
        let losses: Vec<f32> = found[0].0.iter().map(|&loss| loss as f32).collect();
        assert!(max_diff(&losses, &expected("losses")) < 1e-6, "{kind}: {losses:?}");
        let mut count = 0;
        for (path, gradient) in found.iter().flat_map(|(_, gradients)| gradients) {
            let expected = expected(path);
            assert!(max_diff(gradient, &expected) < 1e-5 * max_abs(&expected), "{kind}: {path}");
            count += 1;
        }
        assert_eq!(2 * count + 3, torch.len(), "{kind}: every gradient is compared");
    }
}
