//! Tests of pipelines of MPI processes: they train what one process trains, and refuse what they cannot divide.

use super::{assert_same, command, trained};
use crate::{
    model::{apart, floats, tensors},
    run::train,
    work::WorkDir,
};
use serde_json::Value;
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The rows of a step.
const ROWS: usize = 4;

/// The processes of a run and the settings of its pipeline.
struct Pipeline {
    data: usize,
    pipeline: usize,
    sets: &'static [&'static str],
}

/// Every schedule is on some number of ranks, and every ZeRO stage beside two pipelines.
const PIPELINES: [Pipeline; 7] = [
    Pipeline { data: 1, pipeline: 2, sets: &["parallel.schedule=ZBV"] },
    Pipeline {
        data: 1,
        pipeline: 2,
        sets: &["parallel.schedule=Interleaved1F1B", "train.activation_checkpointing=full"],
    },
    Pipeline { data: 1, pipeline: 3, sets: &["parallel.schedule=ZB-H1"] },
    Pipeline { data: 1, pipeline: 4, sets: &["parallel.partition=[1, 2, 2, 1]"] },
    Pipeline { data: 2, pipeline: 2, sets: &["parallel.zero_stage=0", "parallel.schedule=GPipe"] },
    Pipeline { data: 2, pipeline: 2, sets: &["parallel.zero_stage=1", "parallel.offload_optimizer=cpu"] },
    Pipeline { data: 2, pipeline: 2, sets: &["parallel.zero_stage=2", "parallel.bucket_size=300"] },
];

impl Pipeline {
    fn trained(&self, work: &WorkDir, folder: &str, shared: &[&str]) -> Vec<Value> {
        let Self { data, pipeline, sets } = *self;
        let micro_batches = format!("train.gradient_accumulation={}", ROWS / data);
        let pipeline_set = format!("parallel.pipeline={pipeline}");
        let own = [micro_batches.as_str(), &pipeline_set];
        trained(work, data * pipeline, folder, &[shared, &own, sets].concat())
    }
}

/// Returns all values of the trained model or adapter of a run.
fn result(work: &WorkDir, kind: &str, folder: &str) -> Vec<f32> {
    let file = if kind == "full" { "model/model.safetensors" } else { "adapter/adapter_model.safetensors" };
    let all = tensors(&work.at(folder).join(file)).into_values();
    all.flat_map(|(_, _, bytes)| floats(&bytes)).collect()
}

#[test]
fn mpi_pipelines_train_what_one_process_trains() {
    let work = WorkDir::new();
    for kind in ["full", "lora", "p-tuning-v2"] {
        let kind_set = format!("method.kind={kind}");
        let shared = [kind_set.as_str(), "train.batch_size=1", "train.max_steps=5"];
        let whole = Pipeline { data: 1, pipeline: 1, sets: &[] };
        let alone = whole.trained(&work, &format!("{kind}-alone"), &shared);
        for (index, pipeline) in PIPELINES.iter().enumerate() {
            let found = pipeline.trained(&work, &format!("{kind}-{index}"), &shared);
            let what = format!("{kind}, {} × {} ranks, {:?}", pipeline.data, pipeline.pipeline, pipeline.sets);
            assert_same(&found, &alone, &what);
            let difference =
                apart(&result(&work, kind, &format!("{kind}-{index}")), &result(&work, kind, &format!("{kind}-alone")));
            assert!(difference < 1e-4, "{what}: the result is {difference:e} off");
            // The gradients of one pipeline are summed in the order of one process.
            if pipeline.data == 1 {
                assert_eq!(found, alone, "{what}");
            }
        }
    }
}

#[test]
fn mpi_pipelines_that_do_not_fit_are_refused() {
    let work = WorkDir::new();
    let refused = |ranks: usize, sets: &[&str], words: &[&str]| {
        let output = command(&work, ranks, &train("out", sets)).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{sets:?}: {errors}");
        let line = errors.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(words.iter().all(|word| line.contains(word)), "{sets:?}: {errors}");
        assert!(!work.at("out").exists(), "{sets:?} leaves no folder");
    };
    refused(3, &["parallel.pipeline=2"], &["`parallel.pipeline` = 2", "a multiple of 2 ranks", "found 3"]);
    let product = ["parallel.pipeline=2", "parallel.data=1"];
    refused(4, &product, &["`parallel.data` = 1", "expected 2 ranks", "found 4"]);
    // The model has six segments.
    let chunks = ["parallel.pipeline=4", "parallel.schedule=LoopedBFS", "train.gradient_accumulation=4"];
    refused(4, &chunks, &["`parallel.pipeline` = 4 with 2 stages per rank", "6"]);
}

/// Kills the middle rank at several moments of a run that writes a checkpoint after each step, and goes on with other
/// numbers of ranks.
#[test]
fn mpi_pipeline_goes_on_with_other_ranks_after_a_kill() {
    let work = WorkDir::new();
    let shared = ["method.kind=full", "train.batch_size=1", "train.max_steps=30", "train.save_every=1"];
    let whole = Pipeline { data: 1, pipeline: 1, sets: &[] };
    let alone = whole.trained(&work, "alone", &shared);
    let three =
        ["parallel.pipeline=3", "train.gradient_accumulation=4", "train.scheduler=constant", "train.eval_every=3"];
    let others = [
        Pipeline { data: 1, pipeline: 1, sets: &["--resume"] },
        Pipeline { data: 2, pipeline: 2, sets: &["parallel.zero_stage=2", "--resume"] },
        Pipeline { data: 1, pipeline: 2, sets: &["parallel.schedule=ZBV", "--resume"] },
        Pipeline { data: 1, pipeline: 4, sets: &["--resume"] },
    ];
    for (index, other) in others.iter().enumerate() {
        let folder = format!("killed-{index}");
        let arguments = train(&folder, &[&shared[..], &three].concat());
        let mut job = command(&work, 3, &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        work.wait(&mut job, &folder, 6 + index);
        let start = Instant::now();
        let ranks = Command::new("pgrep").args(["-P", &job.id().to_string()]).output().unwrap().stdout;
        let middle = String::from_utf8(ranks).unwrap().lines().nth(1).unwrap().to_owned();
        assert!(Command::new("kill").args(["-9", &middle]).status().unwrap().success());
        let output = job.wait_with_output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && start.elapsed() < Duration::from_secs(30), "{words}");
        assert!(words.contains("process rank 1") && words.contains("exited on signal 9"), "{words}");
        let found = other.trained(&work, &folder, &shared);
        assert_same(&found, &alone, &format!("{} × {} ranks after a kill", other.data, other.pipeline));
    }
}
