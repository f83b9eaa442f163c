//! The embedded lessons, and the form that their answers have.
//!
//! A medical question is answered under four headings, a line each; any other question is declined in fixed words and
//! one further sentence. The lessons were written for this program. They show the form; they are no medical advice.

use crate::write;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;

const LESSONS: &str = include_str!("lessons.jsonl");

/// The headings of a medical answer, in order.
pub(super) const HEADINGS: [&str; 4] = ["Likely cause", "Warning signs", "What to do", "When to see a doctor"];

/// The beginning of every refusal.
pub(super) const REFUSAL: &str = "I am sorry, I can only help with medical questions.";

/// The split that a lesson belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LessonSplit {
    /// The lesson is trained on.
    Train,
    /// Its validation loss is measured.
    Valid,
    /// Its question is asked before and after fine-tuning.
    Unseen,
}

/// The kind of a lesson's question, which decides the form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LessonKind {
    /// A medical question, which is answered under the headings.
    Medical,
    /// Any other question, which is declined.
    Other,
}

/// One question and the answer it should get.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lesson {
    /// The split of the lesson.
    pub split: LessonSplit,
    /// The kind of the question.
    pub kind: LessonKind,
    /// Its subject. No subject is in two splits.
    pub topic: String,
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
}

/// Returns all lessons, in the order of the file.
pub(super) fn all() -> Result<Vec<Lesson>> {
    let lesson = |line| serde_json::from_str(line).with_context(|| format!("lessons.jsonl: {line}"));
    LESSONS.lines().map(lesson).collect()
}

/// Writes lessons as JSONL with `question` and `answer`, as `medqa train` reads them.
pub(super) fn save<'a>(path: &Path, lessons: impl Iterator<Item = (&'a str, String)>) -> Result<()> {
    let line = |(question, answer)| format!("{}\n", json!({ "question": question, "answer": answer }));
    write::write_atomically(path, lessons.map(line).collect::<String>().as_bytes())
}

/// Returns the text under each of the four headings, if the answer is these four lines and each ends in a full stop.
pub(super) fn parse_headings(answer: &str) -> Option<[&str; 4]> {
    let mut lines = answer.trim().lines();
    let mut bodies = [""; 4];
    for (body, heading) in bodies.iter_mut().zip(HEADINGS) {
        *body = lines.next()?.trim().strip_prefix(heading)?.strip_prefix(": ")?;
        if body.len() < 2 || !body.ends_with('.') {
            return None;
        }
    }
    lines.next().is_none().then_some(bodies)
}

/// Returns the text after the fixed words of a refusal, if the answer is one.
pub(super) fn parse_refusal(answer: &str) -> Option<&str> {
    answer.trim().strip_prefix(REFUSAL).map(str::trim_start)
}

#[cfg(test)]
#[path = "lessons_tests.rs"]
mod tests;
