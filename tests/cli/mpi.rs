//! Tests of runs with several MPI processes: everything sharded that can be, and resumed with fewer ranks.

use crate::{
    model::{apart, floats, tensors},
    run::{lasting, rows, train, train_by},
    work::WorkDir,
};
use serde_json::Value;
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

mod pipeline;

/// Returns the command that starts the binary as `ranks` processes; the machine may have fewer cores, and the user may
/// be root.
fn command(work: &WorkDir, ranks: usize, arguments: &[&str]) -> Command {
    let inner = work.command(arguments);
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "-n", &ranks.to_string()]);
    command.arg(inner.get_program()).args(arguments).current_dir(work.0.path());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("RAYON_NUM_THREADS", "1");
    command
}

fn trained(work: &WorkDir, ranks: usize, folder: &str, sets: &[&str]) -> Vec<Value> {
    let shared = ["train.scheduler=constant", "train.eval_every=3"];
    let output = command(work, ranks, &train(folder, &[&shared, sets].concat())).output().expect("mpirun is installed");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{ranks} ranks, {sets:?}: {words}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1, "one rank speaks");
    lasting(work, folder)
}

#[test]
fn mpi_launch_finds_mpirun_and_says_what_to_install_without_it() {
    let work = WorkDir::new();
    let arguments = [&["launch", "-n", "2", "--"], &train("out", &["parallel.zero_stage=2"])[..]].concat();
    let done = work.succeed(&arguments);
    assert_eq!(done.stdout.lines().count(), 1, "one rank speaks: {done:?}");
    assert!(!lasting(&work, "out").is_empty(), "{done:?}");
    let output = work.command(&arguments).env("PATH", "").output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && words.contains("openmpi-bin"), "{words}");
}

/// Asserts that two runs have the same losses.
fn assert_same(found: &[Value], expected: &[Value], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        for key in ["loss", "valid_loss", "grad_norm", "step", "tokens", "target_tokens"] {
            let (a, b) = (found[key].as_f64(), expected[key].as_f64());
            let near = a == b || a.zip(b).is_some_and(|(a, b)| (a - b).abs() <= 1e-5 * b.abs());
            assert!(near, "{what}: {key}: {found} against {expected}");
        }
    }
}

#[test]
fn mpi_ranks_train_what_one_process_trains_at_every_stage() {
    let work = WorkDir::new();
    for kind in ["lora", "full"] {
        let kind_set = format!("method.kind={kind}");
        for ranks in [2, 3] {
            let accumulated = format!("train.gradient_accumulation={ranks}");
            let steps = [kind_set.as_str(), "train.batch_size=1", "train.max_steps=6"];
            let alone = trained(&work, 1, &format!("{kind}-alone-{ranks}"), &[&steps[..], &[&accumulated]].concat());
            for stage in 0..4 {
                let (folder, stage_set) = (format!("{kind}-{ranks}-{stage}"), format!("parallel.zero_stage={stage}"));
                let offload = match stage {
                    2 => "parallel.offload_optimizer=cpu",
                    3 => "parallel.offload_param=cpu",
                    _ => "parallel.bucket_size=300",
                };
                let found = trained(&work, ranks, &folder, &[&steps[..], &[&stage_set, offload]].concat());
                assert_same(&found, &alone, &format!("{kind}, {ranks} ranks, stage {stage}"));
                let file = if kind == "lora" { "adapter/adapter_model.safetensors" } else { "model/model.safetensors" };
                let values = |folder: &str| -> Vec<f32> {
                    let all = tensors(&work.at(folder).join(file)).into_values();
                    all.flat_map(|(_, _, bytes)| floats(&bytes)).collect()
                };
                let difference = apart(&values(&folder), &values(&format!("{kind}-alone-{ranks}")));
                assert!(difference < 1e-4, "{folder}: {difference}");
            }
        }
    }
}

#[test]
fn mpi_ranks_share_filled_micro_batches_and_one_without_learns_nothing() {
    let work = WorkDir::new();
    work.write("train.jsonl", &rows(0..7));
    // An epoch has four micro-batches: with three ranks, two of them have none in every second step.
    let rows = ["data.packing=fill", "data.max_length=40", "train.batch_size=2"];
    let shared = [&rows[..], &["train.max_steps=6", "method.dropout=0.1"]].concat();
    for ranks in [2, 3] {
        let accumulated = format!("train.gradient_accumulation={ranks}");
        let alone = trained(&work, 1, &format!("alone-{ranks}"), &[&shared[..], &[&accumulated]].concat());
        let found =
            trained(&work, ranks, &format!("ranks-{ranks}"), &[&shared[..], &["parallel.zero_stage=2"]].concat());
        assert_same(&found, &alone, &format!("{ranks} ranks"));
    }
}

#[test]
fn mpi_timeline_has_every_rank_and_says_what_lies_inside_computation() {
    let work = WorkDir::new();
    let sets = ["method.kind=full", "parallel.zero_stage=3", "parallel.offload_param=nvme", "parallel.nvme_path=parts"];
    let arguments = train_by("bare.toml", "out", &[&["--trace", "trace.json"], &sets[..]].concat());
    let output = command(&work, 2, &arguments).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && words.contains("of the time in collectives overlaps computation"), "{words}");
    let trace = work.json("trace.json");
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        for name in ["forward 1", "backward 1", "all_gather", "reduce_scatter", "wait", "step"] {
            assert!(events.iter().any(|event| event["pid"] == rank && event["name"] == name), "rank {rank}: {name}");
        }
    }
    assert_eq!(fs::read_dir(work.at("parts")).unwrap().count(), 0, "files go with their run");
}

#[test]
fn mpi_run_goes_on_with_another_number_of_ranks_after_a_kill() {
    let work = WorkDir::new();
    // Three ranks with two rows each equal one rank that accumulates three micro-batches of two rows.
    let accumulated = "train.gradient_accumulation=3";
    let shared = ["train.batch_size=2", "train.max_steps=40", "train.save_every=1", "method.kind=full"];
    let alone = trained(&work, 1, "alone", &[&shared[..], &[accumulated]].concat());
    let divided = ["train.scheduler=constant", "train.eval_every=3", "parallel.zero_stage=3"];
    let arguments = train("killed", &[&divided, &shared[..]].concat());
    let mut job = command(&work, 3, &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    work.wait(&mut job, "killed", 12);
    let start = std::time::Instant::now();
    let victim = Command::new("pkill").args(["-9", "-n", "-P", &job.id().to_string()]).status().unwrap();
    assert!(victim.success());
    let output = job.wait_with_output().unwrap();
    assert!(!output.status.success() && start.elapsed() < Duration::from_secs(30), "{output:?}");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("exited on signal 9"), "{words}");
    let found = trained(&work, 1, "killed", &[&shared[..], &[accumulated, "--resume"]].concat());
    assert_same(&found, &alone, "after a kill");
}

#[test]
fn mpi_checkpoint_of_a_killed_run_becomes_one_model_or_adapter() {
    let work = WorkDir::new();
    for (kind, ranks, file) in [
        ("full", 2, "model.safetensors"),
        ("lora", 3, "adapter_model.safetensors"),
        ("p-tuning-v2", 2, "adapter_model.safetensors"),
    ] {
        let folder = format!("killed-{kind}");
        let kind_set = format!("method.kind={kind}");
        let recipe = if kind == "lora" { "run.toml" } else { "bare.toml" };
        let sets = ["parallel.zero_stage=3", "train.max_steps=400", "train.save_every=1", &kind_set];
        let arguments = train_by(recipe, &folder, &sets);
        let mut job = command(&work, ranks, &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        work.wait(&mut job, &folder, 6);
        Command::new("pkill").args(["-9", "-n", "-P", &job.id().to_string()]).status().unwrap();
        assert!(!job.wait().unwrap().success());
        let out = format!("out-{kind}");
        work.succeed(&["consolidate", &folder, "--out", &out]);
        let found = tensors(&work.at(&out).join(file));
        assert!(!found.is_empty() && found.values().all(|(_, shape, bytes)| !bytes.is_empty() && !shape.contains(&0)));
        // The checkpoint also has a copy gathered by its ranks; `consolidate` built this one from their shards.
        let last = fs::read_dir(work.at(&folder)).unwrap().map(|entry| entry.unwrap().path());
        let last = last.filter(|path| path.extension().is_none() && path.join("state.json").exists());
        let step = |path: &PathBuf| path.to_string_lossy().rsplit('-').next().unwrap().parse::<usize>().unwrap();
        let last = last.max_by_key(step).unwrap();
        let gathered = last.join(if kind == "full" { "model" } else { "adapter" }).join(file);
        assert_eq!(found, tensors(&gathered), "{kind}");
        let parts = fs::read_dir(&last).unwrap().filter(|entry| {
            entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(&format!("-of-{ranks}.safetensors"))
        });
        assert_eq!(parts.count(), ranks, "{kind}");
        let again = work.run(&["consolidate", &last.to_string_lossy(), "--out", &out]);
        assert!(again.code == Some(2) && again.stderr.contains("exists already"), "{again:?}");
        let eval = ["eval", "--task", "qa-loss", "--data", "valid.jsonl"];
        let of = if kind == "full" { vec!["--model", &out] } else { vec!["--model", "model", "--adapter", &out] };
        work.succeed(&[&eval[..], &of].concat());
    }
    let none = work.run(&["consolidate", "model", "--out", "nothing"]);
    assert!(none.code == Some(2) && none.stderr.contains("no recipe.toml"), "{none:?}");
}
