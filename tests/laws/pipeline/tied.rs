//! A tied table whose optimizer states are in host memory.

use super::*;

/// The gradients of a tied table reach states on the host, where one replica hands them over during the backward pass.
#[test]
fn a_tied_table_learns_with_its_states_on_the_host() {
    let _lock = one_backward_at_a_time();
    let train = |config: EngineConfig| {
        let model = model(Case::Tied);
        let batches = micro_batches(&model, 0..MICRO_BATCHES);
        let mut engine = config.with_optimizer_states_in(MemoryTier::Host).init(model).unwrap();
        let norm = engine.train_step(&batches, 1e-2).unwrap().report.grad_norm;
        let mut read = ReadParameters::default();
        engine.model().visit(&mut read);
        (norm, read.values)
    };
    let (norm, expected) = train(config(Checkpointing::None));
    for (found_norm, found) in threads::run(2, |group| {
        let config = config(Checkpointing::None).with_communicator(Box::new(group));
        train(config.with_pipeline(pipeline(2, PipelineKind::OneFOneB, 1)))
    }) {
        assert!((found_norm - norm).abs() <= 1e-6 * norm, "the norm: {found_norm}, expected {norm}");
        for (path, value) in &found {
            assert!(max_diff(value, &expected[path]) <= 2e-5, "{path} after the step");
        }
    }
}
