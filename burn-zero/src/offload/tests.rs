use super::*;
use crate::optimizer::{AdamW, Lion};

fn piece(n: usize, k: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + k * 101) as f32).sin()).collect()
}

fn id(i: usize) -> ParamId {
    ParamId::from(i as u64)
}

fn parameter(i: usize, elements: usize) -> ParamRef {
    ParamRef { id: id(i), elements }
}

fn snapshot(offload: &OffloadedStates, id: ParamId) -> StateSnapshot {
    let moments = [0, 1].map(|slot| offload.moment(id, slot).into_owned());
    offload.check_reads().unwrap();
    StateSnapshot { step: offload.step(id).unwrap(), moments, scales: None }
}

/// Returns parameters and both moments after four updates; with `stop`, the states are saved and restored after that
/// update.
fn run(tier: &MemoryTier, sizes: &[usize], stop: Option<usize>) -> Vec<(Vec<f32>, [Vec<f32>; 2])> {
    let new = || OffloadedStates::new(Optimizer::AdamW(AdamW::default()), tier, 0).unwrap();
    let (mut offload, mut values): (_, Vec<_>) = (new(), sizes.iter().map(|&n| piece(n, 1000)).collect());
    for step in 0..4 {
        let hyperparameters = Hyperparameters { lr: 1e-2, weight_decay: 0.1, grad_scale: 0.5 };
        for (i, (value, &n)) in values.iter_mut().zip(sizes).enumerate() {
            offload.update(parameter(i, n), hyperparameters, value, &piece(n, step)).unwrap();
        }
        offload.flush().unwrap();
        if stop == Some(step) {
            let mut next = new();
            for (i, &n) in sizes.iter().enumerate() {
                next.restore(parameter(i, n), snapshot(&offload, id(i))).unwrap();
            }
            offload = next;
        }
    }
    let moments = |i| snapshot(&offload, id(i)).moments;
    values.into_iter().enumerate().map(|(i, value)| (value, moments(i))).collect()
}

#[test]
fn a_file_holds_what_memory_holds() {
    let folder = tempfile::tempdir().unwrap();
    let tier = MemoryTier::File(folder.path().join("states"));
    // Sizes below a block of the file, exactly one block, and several blocks with a remainder.
    let sizes = [1, 3000, 256 << 10, (256 << 10) * 3 + 17];
    let memory = run(&MemoryTier::Host, &sizes, None);
    for stop in [None, Some(1)] {
        assert!(run(&tier, &sizes, stop) == memory, "stopped after {stop:?}");
        assert!(run(&MemoryTier::Host, &sizes, stop) == memory, "stopped after {stop:?}");
    }
    let left = folder.path().join("states").read_dir().unwrap().count();
    assert_eq!(left, 0, "the file is removed when its owner is dropped");
}

/// An error ends a step, but neither a later flush nor the update of another shard may wait for a request that is lost.
#[test]
fn after_an_error_of_the_file_nothing_is_in_flight() {
    let folder = tempfile::tempdir().unwrap();
    let tier = MemoryTier::File(folder.path().to_owned());
    let new = |tier: &MemoryTier| OffloadedStates::new(Optimizer::AdamW(AdamW::default()), tier, 0).unwrap();
    let hyperparameters = Hyperparameters { lr: 1e-2, weight_decay: 0.1, grad_scale: 1.0 };
    let (n, mut states) = ((256 << 10) * 3 + 17, new(&tier));
    let mut large = piece(n, 1000);
    states.update(parameter(0, n), hyperparameters, &mut large, &piece(n, 0)).unwrap();
    states.flush().unwrap();
    // The file ends in its second block.
    let path = folder.path().read_dir().unwrap().next().unwrap().unwrap().path();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4 * n as u64).unwrap();
    let (done, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let error = states.update(parameter(0, n), hyperparameters, &mut large, &piece(n, 1)).unwrap_err();
        states.flush().unwrap();
        let mut small = piece(3000, 1000);
        states.update(parameter(1, 3000), hyperparameters, &mut small, &piece(3000, 0)).unwrap();
        states.flush().unwrap();
        done.send((error, small, snapshot(&states, id(1)).moments)).unwrap();
    });
    let outcome = outcome.recv_timeout(std::time::Duration::from_secs(60));
    let (error, small, moments) = outcome.expect("neither a wait without end nor a panic");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let (mut memory, mut expected) = (new(&MemoryTier::Host), piece(3000, 1000));
    memory.update(parameter(1, 3000), hyperparameters, &mut expected, &piece(3000, 0)).unwrap();
    assert!((small, moments) == (expected, snapshot(&memory, id(1)).moments), "the file goes on as memory does");
}

#[test]
fn what_the_host_cannot_do_is_refused() {
    let error = OffloadedStates::new(Optimizer::Lion(Lion::default()), &MemoryTier::Host, 0).err().unwrap();
    assert!(error.to_string().contains("Adam or AdamW"), "{error}");
    let error = OffloadedStates::new(Optimizer::AdamW(AdamW::default()), &MemoryTier::File("/dev/null/x".into()), 0)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}
