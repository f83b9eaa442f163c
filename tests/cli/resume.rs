//! Tests that a killed or interrupted run resumes as if it had not been stopped.

use crate::{
    run::{lasting, number, train},
    work::{RECIPE, WorkDir},
};
use serde_json::{Value, json};
use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

/// Returns the arguments of a long run into `folder` that saves after every step.
fn long<'a>(folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let sets = ["train.save_every=1", "method.dropout=0.1", "train.eval_every=40", "train.learning_rate=1e-3"];
    train(folder, &[&sets, more].concat())
}

/// Kills the run in `folder` a `moment` after it has written `lines` lines of metrics.
fn kill_after(work: &WorkDir, arguments: &[&str], folder: &str, lines: usize, moment: Duration) {
    let mut run = work.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    work.wait(&mut run, folder, lines);
    std::thread::sleep(moment);
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn runs_that_were_killed_go_on_bit_for_bit() {
    let work = WorkDir::new();
    for (kills, sets, written) in [
        (20, vec!["train.max_steps=260"], "adapter/adapter_model.safetensors"),
        (3, vec!["train.max_steps=60", "method.kind=full"], "model/model.safetensors"),
    ] {
        let (whole, broken) = (format!("whole-{kills}"), format!("broken-{kills}"));
        work.succeed(&long(&whole, &sets));
        let resumed = long(&broken, &[&sets[..], &["--resume"]].concat());
        for kill in 0..kills {
            let arguments = if kill == 0 { &long(&broken, &sets) } else { &resumed };
            // Steps and saves take about equally long here, so many of the kills happen during a save.
            let moment = Duration::from_micros(kill as u64 * 2654435761 % 7000);
            kill_after(&work, arguments, &broken, 12 * (kill + 1), moment);
        }
        let done = work.succeed(&resumed);
        assert!(done.stderr.contains("resuming after step"), "{done:?}");
        let bytes = |folder: &str| fs::read(work.at(&format!("{folder}/{written}"))).unwrap();
        assert_eq!(bytes(&broken), bytes(&whole));
        assert_eq!(lasting(&work, &broken), lasting(&work, &whole));
        let left: Vec<_> =
            work.listing().into_keys().filter(|path| path.extension() == Some("part".as_ref())).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// With micro-batches filled up to a token limit, training sees the same rows in fewer steps, and a pause changes
/// nothing.
#[test]
fn filled_micro_batches_show_every_row_and_a_pause_changes_nothing() {
    let work = WorkDir::new();
    let row = |i: usize| {
        let answer = ["It is a number."; 4][..1 + i * i % 4 + i % 3 / 2].join(" ");
        json!({"question": format!("What is {i}?"), "answer": answer}).to_string() + "\n"
    };
    work.write("train.jsonl", &(0..23).map(row).collect::<String>());
    let run = |folder: &str, sets: &[&str]| {
        let shared = ["data.max_length=100", "train.scheduler=constant", "train.save_every=3", "method.dropout=0.1"];
        work.run(&train(folder, &[&shared, sets].concat()))
    };
    // The length of these runs is given in epochs.
    work.write("run.toml", &RECIPE.replace("max_steps = 12\n", ""));
    let taken = |folder: &str| -> Vec<Value> {
        lasting(&work, folder).into_iter().filter(|line| line.get("loss").is_some()).collect()
    };
    let sum = |lines: &[Value], key: &str| lines.iter().map(|line| number(line, key)).sum::<f64>();
    assert_eq!(run("plain", &[]).code, Some(0));
    let plain = taken("plain");
    for (name, grouped) in [("alike", "data.group_by_length=true"), ("mixed", "data.group_by_length=false")] {
        let (whole, parts) = (format!("{name}-whole"), format!("{name}-parts"));
        let sets = ["data.packing=fill", grouped];
        let done = run(&whole, &[&sets[..], &["train.epochs=3"]].concat());
        assert_eq!(done.code, Some(0), "{done:?}");
        let all = taken(&whole);
        assert_eq!(number(all.last().unwrap(), "epoch"), 3.0);
        let epoch: Vec<Value> = all.iter().filter(|line| number(line, "epoch") <= 1.0).cloned().collect();
        assert!(epoch.len() < plain.len(), "{} steps against {}", epoch.len(), plain.len());
        for key in ["tokens", "target_tokens"] {
            assert_eq!(sum(&epoch, key), sum(&plain, key));
            assert_eq!(sum(&all, key), 3.0 * sum(&plain, key));
        }
        assert!(all.iter().all(|line| number(line, "tokens") <= 2.0 * 100.0), "{all:?}");
        // Stop half-way through the second epoch, then resume.
        assert_eq!(run(&parts, &[&sets[..], &["train.epochs=1.5"]].concat()).code, Some(0));
        fs::remove_file(work.at(&parts).join("summary.json")).unwrap();
        let other = run(&parts, &[&sets[..], &["train.epochs=3", "train.batch_size=4", "--resume"]].concat());
        assert!(other.code == Some(2) && other.stderr.contains("`train.batch_size`: the run has 2"), "{other:?}");
        let done = run(&parts, &[&sets[..], &["train.epochs=3", "--resume"]].concat());
        assert!(done.code == Some(0) && done.stderr.contains("resuming after step"), "{done:?}");
        assert_eq!(taken(&parts), all);
        let bytes = |folder: &str| fs::read(work.at(&format!("{folder}/adapter/adapter_model.safetensors"))).unwrap();
        assert_eq!(bytes(&parts), bytes(&whole), "{name}");
    }
}

#[test]
fn an_interrupted_run_leaves_a_checkpoint_and_can_be_longer_when_it_goes_on() {
    let work = WorkDir::new();
    let arguments = train("run", &["train.max_steps=100000"]);
    let mut run = work.command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
    work.wait(&mut run, "run", 4);
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    let step: usize = work.json_of_latest_checkpoint("run")["step"].as_u64().unwrap() as usize;
    assert!(stderr.contains(&format!("interrupted after step {step}")), "{stderr}");
    let steps = format!("train.max_steps={}", step + 5);
    let longer = train("run", &["--resume", &steps]);
    work.succeed(&longer);
    assert_eq!(lasting(&work, "run").last().unwrap()["step"], json!(step + 5));
    // Runs that cannot be resumed are refused with a reason.
    for (arguments, words) in
        [(&longer, "the run is complete"), (&train("other", &["--resume"]), "there is no run to resume")]
    {
        let done = work.run(arguments);
        assert!(done.code == Some(2) && done.stderr.contains(words), "{done:?}");
    }
    fs::remove_file(work.at("run/summary.json")).unwrap();
    let done = work.run(&train("run", &["--resume", "method.r=8"]));
    assert!(done.code == Some(2) && done.stderr.contains("`method.r`: the run has 4, the recipe 8"), "{done:?}");
    let state = work.at(&format!("run/checkpoint-{step}/training.safetensors"));
    let bytes = fs::read(&state).unwrap();
    fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let done = work.run(&longer);
    let clear = done.stderr.contains("the checkpoint is damaged; remove this folder");
    assert!(done.code == Some(2) && clear && !done.stderr.contains("panicked"), "{done:?}");
}
