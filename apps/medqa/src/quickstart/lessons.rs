//! The embedded lessons, and the form that their answers have.
//!
//! A medical question is answered under four headings, a line each; any other question is declined in fixed words and one
//! sentence more. The lessons were written for this program. They show the form; they are no medical advice.

use crate::write;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;

const LESSONS: &str = include_str!("lessons.jsonl");

/// The headings of a medical answer, in order.
pub const HEADINGS: [&str; 4] = ["Likely cause", "Warning signs", "What to do", "When to see a doctor"];

/// How every refusal begins.
pub const REFUSAL: &str = "I am sorry, I can only help with medical questions.";

/// What a lesson is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// It is learned.
    Train,
    /// Its loss is measured.
    Valid,
    /// Its question is asked before and after.
    Unseen,
}

/// What a lesson teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// To answer under the headings.
    Medical,
    /// To decline.
    Other,
}

/// One question and the answer it should get.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lesson {
    /// What it is for.
    pub split: Split,
    /// What it teaches.
    pub kind: Kind,
    /// Its subject. No subject is in two splits.
    pub topic: String,
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
}

/// All lessons, in the order of the file.
pub fn all() -> Result<Vec<Lesson>> {
    let lesson = |line| serde_json::from_str(line).with_context(|| format!("lessons.jsonl: {line}"));
    LESSONS.lines().map(lesson).collect()
}

/// Writes lessons as JSONL with `question` and `answer`, as `medqa train` reads them.
pub fn save<'a>(path: &Path, lessons: impl Iterator<Item = (&'a str, String)>) -> Result<()> {
    let line = |(question, answer)| format!("{}\n", json!({ "question": question, "answer": answer }));
    write::whole(path, lessons.map(line).collect::<String>().as_bytes())
}

/// What stands under each of the four headings, if the answer is these four lines and each ends in a full stop.
pub fn headed(answer: &str) -> Option<[&str; 4]> {
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

/// What follows the fixed words of a refusal, if the answer is one.
pub fn refused(answer: &str) -> Option<&str> {
    answer.trim().strip_prefix(REFUSAL).map(str::trim_start)
}

#[cfg(test)]
#[path = "lessons_tests.rs"]
mod tests;
