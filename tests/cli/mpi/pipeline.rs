//! Tests of pipelines of MPI processes: they train what one process trains, and refuse what they cannot divide.

use super::{assert_same, trained};
use crate::work::WorkDir;
use serde_json::Value;

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
            // The gradients of one pipeline are summed in the order of one process.
            if pipeline.data == 1 {
                assert_eq!(found, alone, "{what}");
            }
        }
    }
}
