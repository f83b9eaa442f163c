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
        &["schedule", "--stages", "4", "--micro-batches", "6", "--kind", "zbv", "--chunks", "3"],
        &["schedule", "--stages", "4", "--micro-batches", "6", "--backward-weight", "2.5"],
        &["schedule", "--stages", "4", "--micro-batches", "6", "--backward", "-1"],
        &["schedule", "--stages", "4", "--micro-batches", "6", "--tokens", "8"],
        &["estimate", "--config", "nowhere.json"],
        &["estimate", "--config", "model/config.json", "--measure"],
        &["estimate", "--config", "model/config.json", "--method", "ia3"],
    ] {
        let done = work.run(arguments);
        assert!(done.code == Some(2) && done.stderr.contains("error: "), "{arguments:?}: {done:?}");
    }
}

/// Returns a trace file of two stages that run ZB-H1 with three micro-batches, each pass `long` microseconds.
fn trace(long: f64) -> Value {
    let rows = [
        [
            ["F 0", "F 1", "I 0", "W 0", "F 2", "I 1", "W 1", "I 2", "W 2"],
            ["0", "1", "3", "4", "5", "6", "7", "8", "9"],
        ],
        [
            ["F 0", "I 0", "F 1", "I 1", "W 0", "F 2", "I 2", "W 1", "W 2"],
            ["1", "2", "3", "4", "5", "6", "7", "8", "9"],
        ],
    ];
    let span = |rank: usize, name: &str, slot: &str| {
        let start = 1e15 + long * slot.parse::<f64>().unwrap();
        json!({ "name": name, "ph": "X", "pid": rank, "tid": 0, "ts": start, "dur": long, "args": { "chunk": 0 } })
    };
    let row = |(rank, [names, slots]): (usize, [[&str; 9]; 2])| {
        names.into_iter().zip(slots).map(|(name, slot)| span(rank, name, slot)).collect::<Vec<_>>()
    };
    json!({ "traceEvents": rows.into_iter().enumerate().flat_map(row).collect::<Vec<_>>() })
}

#[test]
fn a_measured_schedule_is_shown_beside_the_simulated_one() {
    let work = WorkDir::new();
    work.write("trace.json", &trace(500.0).to_string());
    let two = ["schedule", "--stages", "2", "--micro-batches", "3", "--trace", "trace.json"];
    let done = work.succeed(&[&two[..], &["--kind", "ZB-H1", "--svg", "both.svg"]].concat());
    // Each rank works for 9 of 10 slots of half a millisecond.
    let bubble = done.stdout.lines().find(|line| line.starts_with("bubble ")).unwrap();
    assert_eq!(bubble.split_whitespace().collect::<Vec<_>>(), ["bubble", "10.0", "%", "10.0", "%"], "{done:?}");
    assert!(done.stdout.contains("live activations 2, 1 at") && done.stdout.contains("weights 2, 2 at"), "{done:?}");
    let picture = work.text("both.svg");
    assert!(picture.contains(">measured<") && picture.matches(">rank 1<").count() == 2, "{picture}");
    let refused = |arguments: &[&str], expected: &str| {
        let done = work.run(&[&two[..], arguments].concat());
        assert!(done.code == Some(2) && done.stderr.contains(expected), "{arguments:?}: {done:?}");
    };
    refused(&["--kind", "1F1B"], "trace.json: `trace`: expected Backward(chunk 0, micro-batch 0) in the last step of");
    refused(&["--kind", "ZB-H1", "--backward", "3"], "cannot be used with");
    work.write("trace.json", "[]");
    refused(&[], "trace.json: `trace`: expected JSON with spans in `traceEvents`");
}

#[test]
fn a_measured_model_is_divided_into_stages() {
    let work = WorkDir::new();
    let measured = |stages| ["schedule", "--stages", stages, "--micro-batches", "4", "--measure", "model"];
    let done = work.succeed(&[&measured("2")[..], &["--tokens", "64"]].concat());
    let config: Value = serde_json::from_str(&work.text("model/config.json")).unwrap();
    let segments = 2 * config["num_hidden_layers"].as_u64().unwrap() as usize + 2;
    let lines = done.stdout.lines().skip_while(|line| !line.starts_with("segment "));
    let rows: Vec<Vec<&str>> = lines.skip(1).take(segments).map(|line| line.split_whitespace().collect()).collect();
    let column = |row: &Vec<&str>, from_end: usize| row[row.len() - from_end].parse::<f64>().unwrap();
    assert_eq!((rows[0][0], rows[segments - 1][0]), ("embedding", "head"), "{done:?}");
    assert!(rows.iter().all(|row| column(row, 2) >= 0.0) && rows.iter().any(|row| column(row, 2) > 0.0), "{done:?}");
    let stages: Vec<f64> = rows.iter().map(|row| column(row, 1)).collect();
    assert!(stages.is_sorted() && stages[0] == 0.0 && stages[segments - 1] == 1.0, "{done:?}");
    let done = work.run(&measured("40"));
    let expected = format!("`stages`: expected between 1 and {segments}, the number of segments, found 40");
    assert!(done.code == Some(2) && done.stderr.contains(&expected), "{done:?}");
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
