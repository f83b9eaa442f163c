//! Incomplete checkpoints, lost ranks and gradients that are not finite.

use super::{
    world::{CASES, STAGES, batch, in_world, values},
    *,
};
use crate::comm::threads;

#[test]
fn an_incomplete_state_is_refused() {
    let _alone = backward_lock();
    let (case, folder) = (CASES[0], tempfile::tempdir().unwrap());
    let path = folder.path().join("state.safetensors");
    in_world(case, ZeroStage::OptimizerStates, 3, 1, |_, engine| engine.save(&path).unwrap());
    let missing = case.engine().restore(&folder.path().join("other.safetensors")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
    std::fs::remove_file(folder.path().join("state.1-of-3.safetensors")).unwrap();
    let incomplete = case.engine().restore(&path).unwrap_err();
    assert!(incomplete.to_string().contains("1-of-3"), "{incomplete}");
}

#[test]
fn a_lost_rank_ends_the_step_of_the_others() {
    let _alone = backward_lock();
    for stage in STAGES {
        let errors = threads::run(3, |group| {
            let sharding = Sharding { stage, bucket_size: 300 };
            let config = CASES[0].config().with_communicator(Box::new(group)).with_sharding(sharding);
            let mut engine = config.init(CASES[0].model()).unwrap();
            if engine.rank() == 2 {
                return None;
            }
            let lost = engine.forward_backward(&[batch(0, 0)]).and_then(|_| engine.step(1e-3));
            Some(lost.unwrap_err().to_string())
        });
        assert!(errors.iter().flatten().any(|error| error.contains("rank 2 has ended")), "{stage:?}: {errors:?}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() {
    let _alone = backward_lock();
    for stage in STAGES {
        let skipped = threads::run(3, |group| {
            let sharding = Sharding { stage, bucket_size: 300 };
            let config = CASES[0].config().with_communicator(Box::new(group)).with_sharding(sharding);
            let mut engine = config.init(CASES[0].model()).unwrap();
            let before = engine.with_full_params(values).unwrap();
            let total = if engine.rank() == 1 { 0.0 } else { 20.0 };
            engine.forward_backward(&[ToyBatch::new(0, 9, total)]).unwrap();
            let error = engine.step(1e-3).unwrap_err();
            assert!(matches!(error, Error::Numeric(crate::NumericError::NotFinite { step: 0, .. })), "{error}");
            engine.with_full_params(values).unwrap() == before
        });
        assert!(skipped.into_iter().all(|same| same), "{stage:?}");
    }
}
