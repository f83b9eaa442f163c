//! Tests of `doctor` on correct and on broken set-ups.

use crate::{
    run::conversations,
    work::{TURNS, WorkDir},
};
use std::fs;

#[test]
fn doctor_approves_what_is_right_and_finds_what_is_not() {
    let work = WorkDir::new();
    work.write("messages.jsonl", &conversations(0..3));
    fn doctor<'a>(rest: &[&'a str]) -> Vec<&'a str> {
        [&["doctor"], rest].concat()
    }
    for arguments in [
        &["--model", "turns"][..],
        &["--model", "turns", "--data", "train.jsonl"],
        &["--model", "turns", "--data", "messages.jsonl", "--format", "messages"],
    ] {
        let done = work.succeed(&doctor(arguments));
        assert!(
            done.stdout.lines().count() >= 10 && done.stdout.lines().all(|line| line.starts_with("ok ")),
            "{done:?}"
        );
        assert_eq!(done.stderr, "");
    }
    // Each broken set-up fails the check that it violates.
    work.copy_of_model("silent");
    work.template(
        "silent",
        Some("{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}"),
    );
    work.copy_of_model("endless");
    work.template("endless", Some(&TURNS.replace("{{ eos_token }}", "")));
    work.copy_of_model("infinite");
    let mut weights = fs::read(work.at("model/model.safetensors")).unwrap();
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(work.at("infinite/model.safetensors"), weights).unwrap();
    work.template("infinite", Some(TURNS));
    work.copy_of_model("base");
    work.template("base", None);
    for (model, law, words) in [
        ("silent", "chat template renders turn by turn", "`content`: expected the chat template to print it"),
        ("silent", "training ends an answer as chat does", "`content`: expected the chat template to print it"),
        ("endless", "chat template renders turn by turn", "ends an answer without an end token"),
        ("infinite", "logits are finite", "expected a finite number, found NaN"),
        ("base", "training reads what chat sends", "no chat template"),
    ] {
        let done = work.run(&doctor(&["--model", model]));
        assert_eq!(done.code, Some(1), "{model}: {done:?}");
        let line = done.stdout.lines().find(|line| line.contains(law)).unwrap();
        assert!(line.starts_with("FAIL") && line.contains(words), "{model}: {done:?}");
        assert!(done.stderr.starts_with("error: ") && done.stderr.ends_with(" of 12 checks failed\n"), "{done:?}");
    }
}
