//! Tests of every data format and of `data check`.

use crate::{
    run::{conversations, number, rows, run_folder, train},
    work::WorkDir,
};
use serde_json::json;

/// Returns a file in PubMedQA's format: items by id.
pub(crate) fn pubmedqa() -> String {
    let item =
        |decision: &str| json!({"QUESTION": "Is it so?", "CONTEXTS": ["One.", "Two."], "final_decision": decision});
    json!({"31": item("yes"), "7": item("no"), "12": item("maybe")}).to_string()
}

#[test]
fn conversations_of_every_format_are_trained_together() {
    let work = WorkDir::new();
    work.write("messages.jsonl", &conversations(0..4));
    work.write("valid.jsonl", &conversations(6..8));
    let pair = json!([{"from": "human", "value": "What is 4?"}, {"from": "gpt", "value": "It is a number."}]);
    work.write("sharegpt.json", &json!([{"conversations": pair, "system": "Be brief."}]).to_string());
    let alpaca = json!([{"instruction": "What is", "input": "5?", "output": "It is a number."}]);
    work.write("alpaca.json", &alpaca.to_string());
    work.write("named.jsonl", &rows(4..6).replace("question", "prompt"));
    let sets = [
        "model.path=turns",
        "data.format=messages",
        "data.train=['messages.jsonl', {path='sharegpt.json', format='sharegpt'}, {path='alpaca.json', format='alpaca', \
         weight=2}, {path='named.jsonl', format='qa', columns={question='prompt'}}]",
    ];
    let done = work.succeed(&train("out", &sets));
    let summary = run_folder(&work, "out", 12, &["adapter/adapter_model.safetensors"]);
    for line in ["messages.jsonl: 4 rows", "sharegpt.json: 1 rows", "alpaca.json: 1 rows", "named.jsonl: 2 rows"] {
        assert!(done.stderr.contains(line), "{done:?}");
    }
    let of = |extra: &[&'static str]| {
        let eval = ["eval", "--task", "qa-loss", "--model", "turns", "--adapter", "out/adapter", "--data"];
        work.succeed(&[&eval[..], extra].concat()).json()
    };
    let loss = of(&["valid.jsonl", "--format", "messages"]);
    assert!((number(&loss, "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4, "{loss} {summary}");
    // The four answers are learned as those of four rows, up to the end token: the newline after it is not a target.
    let rows = number(&of(&["train.jsonl", "--limit", "4"]), "target_tokens") as u64;
    assert_eq!(loss["target_tokens"], rows);
    let named = of(&["named.jsonl", "--columns", "question=prompt"]);
    assert_eq!(named["rows"], 2);
}

#[test]
fn data_check_counts_measures_shows_a_row_and_lists_mistakes() {
    let work = WorkDir::new();
    fn check<'a>(rest: &[&'a str]) -> Vec<&'a str> {
        [&["data", "check", "--model", "turns"], rest].concat()
    }
    let done = work.succeed(&check(&["train.jsonl"]));
    for line in [
        "train.jsonl: 6 rows, at most 512 tokens each",
        "truncated                        0",
        "with a mistake                   0",
        "examples                         6",
        "user: What is 0?<|end_of_text|>\n<|begin_of_text|>assistant:[[ It is a number.<|end_of_text|>]]",
    ] {
        assert!(done.stdout.contains(line), "{line}: {}", done.stdout);
    }
    assert_eq!(done.stderr, "");
    // The row lengths equal those that training counts.
    let (median, learned) = (20, 8);
    let lengths = |stdout: &str, name: &str, key: &str| -> usize {
        let line = stdout.lines().find(|line| line.starts_with(&format!("{name}  "))).unwrap();
        let rest = &line[line.find(&format!("{key} ")).unwrap() + key.len() + 1..];
        rest.split(',').next().unwrap().parse().unwrap()
    };
    assert!(lengths(&done.stdout, "tokens", "median") >= median, "{}", done.stdout);
    assert!(lengths(&done.stdout, "tokens to learn", "max") >= learned, "{}", done.stdout);
    let least = lengths(&done.stdout, "tokens", "min");
    let (cut, max) = (least - 2, (least - 2).to_string());
    let truncated = work.succeed(&check(&["train.jsonl", "--max-length", &max]));
    assert!(truncated.stdout.contains("truncated                        6"), "{}", truncated.stdout);
    assert_eq!(lengths(&truncated.stdout, "tokens", "max"), cut);
    work.write("two.jsonl", &(rows(0..1) + &rows(1..2).replace("is 1", &"is a long one ".repeat(9))));
    let dropped = work.succeed(&check(&["two.jsonl", "--max-length", "40", "--on-too-long", "drop"]));
    assert!(dropped.stdout.contains("dropped as too long              1"), "{}", dropped.stdout);

    let mistakes = conversations(0..2)
        + "\n{\"messages\": [{\"role\": \"bot\", \"content\": \"x\"}]}\n{\"messages\": \n"
        + "{\"messages\": [{\"role\": \"user\", \"content\": \"never answered\"}]}\n"
        + &"{\"message\": 1}\n".repeat(12);
    work.write("wrong.jsonl", &mistakes);
    let done = work.run(&check(&["wrong.jsonl", "--format", "messages"]));
    assert_eq!(done.code, Some(2), "{done:?}");
    for line in [
        "without a token to learn         1",
        "with a mistake                  14",
        "assistant:[[ It is a number.<|end_of_text|>]]\n<|begin_of_text|>user: And 1?",
        "wrong.jsonl:4: turn 1: `role`: expected system, developer, user, assistant or tool, found \"bot\"",
        "wrong.jsonl:5: expected a JSON object",
        "wrong.jsonl:7: expected the key `messages`, found message",
        "and 4 more",
    ] {
        assert!(done.stdout.contains(line), "{line}: {}", done.stdout);
    }
    assert_eq!(done.stderr, "error: wrong.jsonl: 14 of 17 rows have a mistake\n");
}

#[test]
fn pubmedqa_is_trained_and_scored() {
    let work = WorkDir::new();
    work.write("pubmedqa.json", &pubmedqa());
    let sets = ["data.train=pubmedqa.json", "data.format=pubmedqa", "data.valid=pubmedqa.json"];
    let summary = work.succeed(&train("out", &sets)).json();
    let eval = |extra: &[&str]| {
        let eval = ["eval", "--data", "pubmedqa.json", "--model", "model", "--adapter", "out/adapter"];
        work.succeed(&[&eval[..], extra].concat()).json()
    };
    let with = |extra: &[&str]| eval(&[&["--task", "pubmedqa"], extra].concat());
    let short = with(&["--out", "scores.json"]);
    let whole = work.json("scores.json");
    for key in ["task", "n", "accuracy", "macro_f1"] {
        assert_eq!(short[key], whole[key], "{key}");
    }
    assert_eq!((&short["task"], &short["n"], short.get("items")), (&json!("pubmedqa"), &json!(3), None));
    assert!((0.0..=1.0).contains(&number(&short, "accuracy")) && (0.0..=1.0).contains(&number(&short, "macro_f1")));
    let items = whole["items"].as_object().unwrap();
    assert_eq!(items.keys().collect::<Vec<_>>(), ["31", "7", "12"]);
    for item in items.values() {
        let scores: Vec<f64> = serde_json::from_value(item["loglikelihood"].clone()).unwrap();
        let best = (0..3).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        assert!(scores.iter().all(|score| *score < 0.0), "{item}");
        assert_eq!(item["prediction"], ["yes", "no", "maybe"][best]);
    }
    assert_eq!(with(&["--limit", "2"])["n"], 2);
    // The loss on the decisions equals the validation loss of training.
    let loss = eval(&["--task", "qa-loss", "--format", "pubmedqa"]);
    assert!((number(&loss, "loss") - number(&summary, "valid_loss_after")).abs() < 1e-4);
}
