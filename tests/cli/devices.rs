//! Tests that all devices of this build agree.

use crate::{
    run::{lasting, number, train, train_by},
    work::WorkDir,
};

/// Returns the devices of this build.
fn devices() -> Vec<&'static str> {
    let all = [
        ("cpu", cfg!(feature = "flex")),
        ("tch", cfg!(feature = "tch")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("wgpu", cfg!(feature = "wgpu")),
    ];
    all.into_iter().filter(|(_, here)| *here).map(|(name, _)| name).collect()
}

/// Trains on one device and validates on every other, during training and afterwards.
#[test]
fn a_run_on_any_device_is_validated_on_every_other() {
    let work = WorkDir::new();
    let losses = |folder: &str| -> Vec<f64> {
        let lines = lasting(&work, folder).into_iter();
        lines.filter_map(|line| line["valid_loss"].as_f64().or(line["loss"].as_f64())).collect()
    };
    let mut expected: Option<Vec<f64>> = None;
    // Lavapipe takes seconds to compile a kernel, and training has many of them.
    for device in devices().into_iter().filter(|device| ["cpu", "tch"].contains(device)) {
        for there in devices() {
            let (folder, set) = (format!("{device}-{there}"), format!("train.eval_device={there}"));
            work.succeed(&train(&folder, &["--device", device, &set, "train.max_steps=5"]));
            let found = losses(&folder);
            let expected = expected.get_or_insert_with(|| found.clone());
            assert_eq!(found.len(), 7, "{found:?}");
            let close = found.iter().zip(&*expected).all(|(a, b)| (a - b).abs() < 1e-3 * b);
            assert!(close, "trained on {device}, validated on {there}: {found:?} against {expected:?}");
            let adapter = format!("{folder}/adapter");
            let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl", "--model", "model", "--device", there];
            let loss = number(&work.succeed(&[&eval[..], &["--adapter", &adapter]].concat()).json(), "loss");
            assert!((loss - expected[6]).abs() < 1e-3 * expected[6], "{there}: {loss} against {expected:?}");
        }
    }
    // Without `eval_device`, which also works in a build with one backend, training and validation use the same device.
    work.succeed(&train("here", &["train.max_steps=5"]));
    assert!(losses("here").iter().zip(&expected.unwrap()).all(|(a, b)| (a - b).abs() < 1e-5 * b));
}

/// The placement of optimizer states and weights does not change the losses on any device.
#[test]
fn offload_from_any_device_changes_no_loss() {
    let work = WorkDir::new();
    // Lavapipe takes too long to compile the kernels of training.
    for device in devices().into_iter().filter(|device| ["cpu", "tch"].contains(device)) {
        for kind in ["full", "lora"] {
            let losses = |name: &str, sets: &[&str]| -> Vec<f64> {
                let (folder, kind) = (format!("{device}-{kind}-{name}"), format!("method.kind={kind}"));
                let shared = ["--device", device, &kind];
                work.succeed(&train_by("bare.toml", &folder, &[&shared, sets].concat()));
                lasting(&work, &folder).iter().filter_map(|line| line["loss"].as_f64()).collect()
            };
            let expected = losses("none", &[]);
            assert_eq!(expected.len(), 12);
            let table: [(&str, &[&str]); 3] = [
                ("cpu", &["parallel.offload_optimizer=cpu"]),
                ("nvme", &["parallel.offload_optimizer=nvme", "parallel.nvme_path=states"]),
                ("weights", &["parallel.zero_stage=3", "parallel.offload_param=cpu", "parallel.offload_optimizer=cpu"]),
            ];
            for (name, sets) in table {
                let found = losses(name, sets);
                let near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * b);
                assert!(found.len() == 12 && near, "{device}, {kind}, {name}: {found:?} against {expected:?}");
            }
        }
    }
}

#[test]
fn doctor_finds_every_device_of_the_build_healthy() {
    let work = WorkDir::new();
    for device in devices() {
        let mut arguments = vec!["doctor", "--model", "turns", "--device", device];
        let mut laws = if device == "cpu" { 12 } else { 15 };
        if ["vulkan", "wgpu"].contains(&device) {
            // A software device takes minutes to compile the kernels of training.
            arguments.push("--quick");
            laws = 11;
        }
        let done = work.succeed(&arguments);
        assert_eq!(done.stdout.lines().filter(|line| line.starts_with("ok ")).count(), laws, "{device}: {done:?}");
    }
}
