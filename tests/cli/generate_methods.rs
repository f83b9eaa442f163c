//! Tests of the methods of `generate`: rows of every method, damaged answers, and mistakes of the user.

use crate::{
    generate::{KEY, generate, report, work},
    mock_api::{MockApi, MockReply, MockRequest},
    work::{WorkDir, fixture},
};
use serde_json::{Value, json};
use std::{collections::HashSet, fs};

/// Passages that a script of ours has damaged answers for.
fn passages(work: &WorkDir, count: usize) {
    let passage =
        |n: usize| json!({"question": "", "answer": format!("Passage number {n}. It has enough words to be one.")});
    work.write("passages.jsonl", &(0..count).map(|n| format!("{}\n", passage(n))).collect::<String>());
}

fn passage_number(request: &MockRequest) -> usize {
    let text = request.prompt().split("Passage number ").nth(1).unwrap();
    text.split('.').next().unwrap().parse().unwrap()
}

#[test]
fn damaged_answers_are_repaired_or_counted() {
    let work = work();
    let cases: Vec<Value> = fs::read_to_string(fixture("damaged_answers.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(cases.len(), 60);
    passages(&work, 60);
    let bodies: Vec<Value> = cases.iter().map(|case| case["body"].clone()).collect();
    let api = MockApi::start(move |request| MockReply::Body(bodies[passage_number(request)].to_string()));
    let done = generate(&work, &api, "passages", &["--input", "passages.jsonl", "--out", "rows.jsonl"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let questions: Vec<_> = work.lines("rows.jsonl").iter().map(|row| row["question"].clone()).collect();
    let expected: Vec<_> = cases.iter().flat_map(|case| case["questions"].as_array().unwrap().clone()).collect();
    assert_eq!(questions, expected);
    let report = report(&work, "rows.jsonl");
    for (kind, table) in [("repair", "repaired"), ("reason", "removed")] {
        for name in cases.iter().filter_map(|case| case[kind].as_str()).collect::<HashSet<_>>() {
            let count = cases.iter().filter(|case| case[kind] == name).count() as u64;
            assert_eq!(report[table][name], count, "{name}: {report}");
        }
    }
    // Answers without an item are asked for once more, with another seed.
    let lost = cases.iter().filter(|case| case["reason"].is_string()).count();
    assert_eq!(api.count(), 60 + lost);
}

#[test]
fn a_server_without_schemas_is_asked_for_less_once() {
    let work = work();
    passages(&work, 12);
    let api = MockApi::start(|request| match request.body["response_format"]["type"].as_str() {
        Some(kind) => {
            MockReply::status(400, &format!(r#"{{"error": {{"message": "response_format {kind}: unknown"}}}}"#))
        }
        None => MockReply::answer(
            &json!([{"question": format!("What is {}?", request.digest()), "answer": "It."}]).to_string(),
        ),
    });
    let run = || generate(&work, &api, "passages", &["--input", "passages.jsonl", "--out", "r.jsonl", "-n", "12"]);
    let done = run();
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!((done.stderr.matches("note: the server refuses").count(), api.count()), (2, 14), "{done:?}");
    assert_eq!(work.lines("r.jsonl").len(), 12);
    fs::remove_file(work.at("r.jsonl")).unwrap();
    assert_eq!((run().code, api.count(), work.lines("r.jsonl").len()), (Some(0), 14, 12));
}

#[test]
fn magpie_runs_without_key_or_network_and_twice_the_same() {
    let work = WorkDir::new();
    let run = |out: &str| {
        let model = ["generate", "magpie", "--model", "turns", "--requests", "12", "--out", out, "--seed", "1"];
        let sampling = ["--set", "sampling.max_tokens=24", "--set", "sampling.temperature=1.5"];
        work.run(&[&model[..], &sampling].concat())
    };
    let (one, two) = (run("one.jsonl"), run("two.jsonl"));
    // Random weights write junk, which the filters remove, or keep some of it.
    let report = work.json("one.jsonl.generate/report.json");
    assert_eq!((one.code, &one.stdout, report["requests"].as_u64()), (two.code, &two.stdout, Some(12)), "{one:?}");
    assert_eq!(fs::read(work.at("one.jsonl")).ok(), fs::read(work.at("two.jsonl")).ok());
    let text = |out: &str| work.text(&format!("{out}.generate/rejected.jsonl"));
    assert_eq!(text("one.jsonl"), text("two.jsonl"));
}

#[test]
fn chained_methods_write_their_rows() {
    let work = work();
    let api = MockApi::start(|request| {
        let n = request.digest() % 1_000_000;
        let prompt = request.prompt();
        if prompt.starts_with("Rewrite the medical") {
            MockReply::answer(&format!("What causes case {n} of it?"))
        } else if prompt.starts_with("Do these two") {
            MockReply::answer("not equal")
        } else if prompt.starts_with("Rate the answer") {
            MockReply::answer(&format!("So. [[{}]]", 5 + n % 6))
        } else if prompt.starts_with("Write a dialogue") {
            MockReply::answer(&format!("[Human] Is it {n}?\n[AI] It is.\n[Human] And then?\n[AI] Then it goes."))
        } else if prompt.contains("Reply with JSON only") {
            let items: Vec<Value> = (0..2)
                .map(|i| json!({"question": format!("w{} w{} w{n}?", n % 97, n % 89 + i), "answer": "I cannot help with that, call 911."}))
                .collect();
            MockReply::answer(&json!({"items": items}).to_string())
        } else {
            MockReply::answer(&format!("Answer {n}."))
        }
    });
    let fact =
        |uses: &str| json!({"indications": [uses], "symptoms": ["sneezing"], "tests": ["none"], "dose": ["one"]});
    work.write("graph.json", &json!({"Aaa": fact("hay fever"), "Bbb": fact("colds")}).to_string());
    for (method, rest, columns) in [
        ("evolve", &["--input", "seeds.jsonl"][..], &["question", "answer"][..]),
        ("rejection", &["--input", "seeds.jsonl"], &["question", "answer"]),
        ("self-chat", &["--input", "seeds.jsonl"], &["messages"]),
        ("refusals", &["-n", "3"], &["question", "answer"]),
        ("knowledge-graph", &["--graph", "graph.json"], &["question", "answer"]),
    ] {
        let run = |out: &str, concurrency: &str| {
            let options = ["--out", out, "--concurrency", concurrency];
            let done = generate(&work, &api, method, &[rest, &options, &["--requests", "60"]].concat());
            assert_eq!(done.code, Some(0), "{method}: {done:?}");
            work.text(out)
        };
        let (one, two) = (format!("{method}.jsonl"), format!("{method}-2.jsonl"));
        assert_eq!(run(&one, "1"), run(&two, "16"), "{method}");
        for row in work.lines(&one) {
            assert!(columns.iter().all(|column| !row[column].is_null()), "{method}: {row}");
            assert_eq!(row["source"]["method"], method);
        }
    }
    let pairs = work.lines("rejection.pairs.jsonl");
    assert!(!pairs.is_empty() && pairs.iter().all(|pair| pair["chosen"] != pair["rejected"]), "{pairs:?}");
}

#[test]
fn mistakes_are_named_before_anything_is_written() {
    let work = work();
    let run = |arguments: &[&str]| work.run(&[&["generate"], arguments].concat());
    work.write("key.toml", &format!("[api]\napi_key = '{KEY}'\n"));
    for (arguments, words) in [
        (&["self-instruct", "--out", "o.jsonl", "-n", "5"][..], "expected a file to start from: --input FILE"),
        (&["self-instruct", "--seeds", "seeds.jsonl", "--out", "o.jsonl"], "the method has no end of its own"),
        (&["magpie", "--seeds", "seeds.jsonl", "--out", "o.jsonl", "-n", "5"], "expected no input"),
        (&["magpie", "--base-url", "http://127.0.0.1:1", "--out", "o.jsonl", "-n", "5"], "raw text of a chat template"),
        (
            &["magpie", "--out", "o.jsonl", "-n", "5", "--set", "method.samples=3"],
            "`method.samples`: magpie has no such key",
        ),
        (&["magpie", "--out", "seeds.jsonl", "-n", "5", "--model", "turns"], "another file stands there"),
        (&["magpie", "--out", "o.jsonl", "-n", "5", "--recipe", "key.toml"], "api_key_env"),
        (&["magpie", "--out", "o.jsonl", "-n", "0"], "expected a positive integer"),
        (&["magpie", "--out", "o.jsonl", "-n", "1", "--concurrency", "65"], "from 1 to 64"),
    ] {
        let done = run(arguments);
        assert!(done.code == Some(2) && done.stderr.contains(words), "{arguments:?}: {done:?}");
        assert!(!work.at("o.jsonl").exists() && !work.at("o.jsonl.generate").exists(), "{arguments:?}");
        assert!(!done.stderr.contains(KEY), "{done:?}");
    }
}
