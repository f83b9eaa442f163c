//! Golden texts of prompts, for tests. With the environment variable `MEDQA_WRITE_GOLDEN`, they are written anew.

use super::super::{
    draft::Step,
    request::{Prompt, PromptText},
};
use std::path::Path;

/// Compares the text of a prompt with the golden one of that name.
pub(super) fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generate/prompts/golden").join(name);
    if std::env::var_os("MEDQA_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, format!("{text}\n")).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(text, golden.strip_suffix('\n').unwrap(), "{name}");
}

/// Returns the prompt of a step.
pub(super) fn prompt(step: Step) -> Prompt {
    match step {
        Step::Ask(prompt) => prompt,
        other => panic!("a prompt is expected, found {other:?}"),
    }
}

/// Returns the last message of a prompt.
pub(super) fn text(prompt: &Prompt) -> &str {
    match &prompt.text {
        PromptText::Messages(messages) => &messages.last().unwrap().text,
        PromptText::Raw(text) => text,
    }
}
