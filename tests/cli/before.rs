//! Tests of the verbs used before a run: pipeline schedule, memory estimate, benchmark.

use crate::{
    run::{number, refused_in, train},
    work::WorkDir,
};
use serde_json::{Value, json};

#[test]
fn schedules_and_estimates_are_printed_before_anything_is_computed() {
    let work = WorkDir::new();
    let draw = ["--svg", "s.svg", "--csv", "s.csv"];
    let done =
        work.succeed(&[&["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "1f1b"], &draw[..]].concat());
    // (4 - 1) / (8 + 4 - 1)
    assert!(done.stdout.contains("bubble           27.3 %") && done.stdout.contains("4, 3, 2, 1 at most"), "{done:?}");
    assert_eq!(done.stdout.lines().filter(|line| line.starts_with("rank ")).count(), 4, "{done:?}");
    assert!(work.text("s.svg").starts_with("<svg") && work.text("s.csv").lines().count() == 4);
    let config = ["--config", "model/config.json", "--method", "full", "--world", "4"];
    let done = work.succeed(&[&["estimate"], &config[..]].concat());
    // A heading, four ZeRO stages with the optimizer state on the device, in host memory and in a file, stage 3 with
    // parameters in host memory, and five lines by DeepSpeed's formulas.
    assert_eq!(done.stdout.lines().filter(|line| line.contains(" + ")).count(), 1 + 4 * 3 + 1 + 5, "{done:?}");
    let few = ["--method", "lora", "--target-modules", "q_proj,v_proj"];
    work.succeed(&[&["estimate", "--config", "model/config.json"], &few[..]].concat());
    for arguments in [
        &["schedule", "--stages", "0", "--micro-batches", "8"][..],
        &["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "zigzag"],
        &["schedule", "--stages", "4", "--micro-batches", "6", "--kind", "interleaved1f1b", "--chunks", "2"],
        &["estimate", "--config", "nowhere.json"],
        &["estimate", "--config", "model/config.json", "--measure"],
        &["estimate", "--config", "model/config.json", "--method", "ia3"],
    ] {
        let done = work.run(arguments);
        assert!(done.code == Some(2) && done.stderr.contains("error: "), "{arguments:?}: {done:?}");
    }
}

#[test]
fn what_is_estimated_is_counted_and_what_cannot_fit_is_refused() {
    let work = WorkDir::new();
    for method in ["full", "lora"] {
        let measured = ["estimate", "--measure", "--model", "model", "--method", method, "--tokens", "64"];
        let found = work.succeed(&measured).json();
        let (counted, estimated) = (number(&found, "states_counted_gib"), number(&found, "states_estimated_gib"));
        assert!((counted - estimated).abs() <= 0.02 * counted, "{method}: {found}");
        // A model this small may fit into memory that was freed after loading, so the peak can be zero.
        assert!(number(&found, "peak_rss_anon_gib") < 0.1, "{found}");
    }
    // The weights alone exceed this limit.
    let refused = train("out", &["method.kind=full", "train.memory_gib=0.00005"]);
    refused_in(&work, &refused, &["the run needs about", "`train.memory_gib`", "no setting is enough"]);
    let done = work.run(&["train", "run.toml", "--set", "train.memory_gib=-1"]);
    assert!(done.code == Some(2) && done.stderr.contains("train.memory_gib"), "{done:?}");
}

#[test]
fn bench_measures_what_it_is_asked_for() {
    let work = WorkDir::new();
    let small = ["bench", "--model", "model", "--length", "8", "--prompt", "4", "--new-tokens", "3", "--rounds", "1"];
    for (train, trainable) in [("lora", Some(8 * (16 + 16) * 2 + 8 * (16 + 8) * 2)), ("full", None)] {
        let report = work.succeed(&[&small[..], &["--train", train]].concat()).json();
        for speed in [&report["forward"], &report["decode"], &report["train"]] {
            assert!(speed["tokens_per_second"].as_f64().unwrap() > 0.0, "{report}");
        }
        assert_eq!(report["forward"]["tokens"], 8);
        assert_eq!(report["decode"]["tokens"], 3);
        assert_eq!(report["train"]["tokens"], 16);
        if let Some(trainable) = trainable {
            assert_eq!(report["train"]["trainable_parameters"], trainable);
        }
    }
    let report = work.succeed(&[&small[..], &["--train", "none", "--weights", "bf16"]].concat()).json();
    assert_eq!((&report["train"], &report["weights"]), (&Value::Null, &json!("bf16")));
    refused_in(&work, &[&small[..], &["--train", "full", "--weights", "bf16"]].concat(), &["--train full", "f32"]);
    refused_in(&work, &["bench", "--model", "model", "--length", "1"], &["--length", "at least 2"]);
}
