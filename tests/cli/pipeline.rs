//! Tests of recipes whose pipeline cannot be: each is refused in one line.

use crate::{
    run::{refused_in, train, train_by},
    work::WorkDir,
};

#[test]
fn pipelines_that_cannot_be_are_refused() {
    let work = WorkDir::new();
    let two = "parallel.pipeline=2";
    let table: [(&[&str], &[&str]); 11] = [
        (&[two], &["expected a multiple of 2 ranks (mpirun -n 2)", "found 1"]),
        (&[two, "parallel.data=3"], &["`parallel.data` = 3", "expected 6 ranks (mpirun -n 6)", "found 1"]),
        (&["parallel.data=2"], &["`parallel.data` = 2", "expected 2 ranks", "found 1"]),
        (&["parallel.pipeline=0"], &["parallel.pipeline", "expected a positive integer", "found 0"]),
        (
            &[two, "parallel.schedule=Interleaved1F1B", "train.gradient_accumulation=3"],
            &["train.gradient_accumulation", "expected a multiple of", "found 3"],
        ),
        (
            &[two, "parallel.schedule=ZBV", "parallel.chunks=3"],
            &["parallel.chunks", "expected 2 for ZBVZeroBubble", "found 3"],
        ),
        (&[two, "parallel.schedule=2F2B"], &["parallel.schedule", "expected one of GPipe, 1F1B", "found 2F2B"]),
        (&[two, "parallel.zero_stage=3"], &["parallel.zero_stage", "expected 0, 1 or 2 with a pipeline", "found 3"]),
        (
            &[two, "parallel.partition=[1, 2, 3]"],
            &["parallel.partition", "each of the 2 · 1 stages", "found [1, 2, 3]"],
        ),
        (
            &[two, "method.init_lora_weights=pissa"],
            &["method.init_lora_weights", "no rank has the whole model", "method.init"],
        ),
        (
            &[two, "method.init_lora_weights=olora"],
            &["method.init_lora_weights", "no rank has the whole model", "method.init"],
        ),
    ];
    for (sets, words) in table {
        refused_in(&work, &train("out", sets), words);
    }
    let text = [two, "method.kind=prompt", "method.init_text=Answer the question."];
    refused_in(&work, &train_by("bare.toml", "out", &text), &["method.init_text", "no rank has the whole model"]);
}
