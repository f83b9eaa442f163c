//! The report that is printed at the end.

use std::{fmt::Write, path::Path};

use super::{
    ask::{Answers, Questions, Score},
    estimate::{MemoryEstimate, format_mib},
};
use crate::train::Summary;

/// The width of each of the two columns, in characters.
const COLUMN: usize = 48;

/// The results before and after fine-tuning.
pub(super) struct QuickstartReport<'a> {
    /// The questions that were asked.
    pub questions: Questions<'a>,
    /// The answers of the base model.
    pub before: Answers,
    /// The answers with the adapter.
    pub after: Answers,
    /// The results of the run.
    pub summary: Summary,
    /// The memory that was estimated for the run.
    pub estimate: MemoryEstimate,
    /// The total time, in seconds.
    pub seconds: f64,
}

impl QuickstartReport<'_> {
    /// Formats the answers and the measurements, before and after.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for (index, question) in self.questions.shown().enumerate() {
            let answers = [&self.before, &self.after].map(|answers| answers.shown[index].as_str());
            text.push_str(&format!("Q: {question}\n\n{}\n", columns(["before", "after"], answers)));
        }
        text + &self.metrics_table()
    }

    fn metrics_table(&self) -> String {
        let Self { before, after, summary, .. } = self;
        let of = |score: Score| format!("{} of {}", score.right, score.total);
        let loss = |loss: Option<f64>| loss.map_or("not measured".to_owned(), |loss| format!("{loss:.3}"));
        let row = |name: &str, before: String, after: String| format!("{name:<28}{before:>14}{after:>14}\n");
        let mut text = row("", "before".into(), "after".into());
        text += &row("format kept (medical)", of(before.format), of(after.format));
        text += &row("refusals (not medical)", of(before.refusals), of(after.refusals));
        text += &row("validation loss", loss(summary.valid_loss_before), loss(summary.valid_loss_after));
        let (speed, steps) = (summary.tokens_per_second, summary.steps);
        let _ = writeln!(text, "\ntrained {steps} steps, {} tokens, {speed:.0} tokens/s", summary.tokens);
        let (peak, estimate) = (format_mib(summary.peak_rss_bytes), format_mib(self.estimate.total()));
        let _ = writeln!(text, "memory at its peak: {peak} measured, {estimate} estimated");
        let _ = writeln!(text, "all together: {:.0} s", self.seconds);
        text
    }
}

/// Formats the next steps with the result, as commands to copy.
pub(super) fn next_steps(program: &str, model: Option<&str>, directory: &Path) -> String {
    let at = |name: &str| shell_quote(&directory.join(name).display().to_string());
    let (program, adapter, valid) = (shell_quote(program), at("adapter"), at("data/valid.jsonl"));
    let with_model = model.map(|model| format!(" --model {}", shell_quote(model))).unwrap_or_default();
    format!(
        "What to try next\n  \
         talk to it:\n    {program} chat{with_model} --adapter {adapter}\n  \
         measure it:\n    {program} eval --task qa-loss{with_model} --data {valid} --adapter {adapter}\n  \
         train on your own data, a line each of {{\"question\": \"…\", \"answer\": \"…\"}}:\n    \
         {program} train {} --set data.train=mine.jsonl --set data.valid=mine-valid.jsonl --dir runs/mine\n\
         PEFT reads the adapter too: PeftModel.from_pretrained(model, \"{}\")\n",
        at("recipe.toml"),
        directory.join("adapter").display(),
    )
}

/// Quotes a word for a shell, if it needs quotes.
fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Formats two texts side by side under their titles.
fn columns(titles: [&str; 2], texts: [&str; 2]) -> String {
    let [left, right] = texts.map(wrap_lines);
    let line = |left: &str, right: &str| format!("{left:<COLUMN$} | {right}").trim_end().to_owned() + "\n";
    let mut text = line(titles[0], titles[1]) + &line(&"-".repeat(COLUMN), &"-".repeat(COLUMN));
    for index in 0..left.len().max(right.len()) {
        let part = |lines: &[String]| lines.get(index).cloned().unwrap_or_default();
        text += &line(&part(&left), &part(&right));
    }
    text
}

/// Wraps a text into lines of at most [`COLUMN`] characters, between words if possible.
fn wrap_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.trim().lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            let mut word: Vec<char> = word.chars().collect();
            if !line.is_empty() && line.chars().count() + 1 + word.len() > COLUMN {
                lines.push(std::mem::take(&mut line));
            }
            while word.len() > COLUMN {
                lines.push(word.drain(..COLUMN).collect());
            }
            line += if line.is_empty() { "" } else { " " };
            line.extend(word);
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_hold_every_word_and_no_line_is_wider() {
        let long = "x".repeat(2 * COLUMN + 5);
        let text = columns(["before", "after"], [&format!("one {long} two\n\nthree"), "ä".repeat(COLUMN).as_str()]);
        assert!(text.lines().all(|line| line.chars().count() <= 2 * COLUMN + 3), "{text}");
        assert_eq!(text.matches('x').count(), long.len());
        assert!(text.contains("two") && text.contains("three") && text.matches('ä').count() == COLUMN);
    }

    #[test]
    fn commands_survive_a_shell() {
        assert_eq!(shell_quote("runs/quickstart"), "runs/quickstart");
        assert_eq!(shell_quote("my runs/it's"), r"'my runs/it'\''s'");
        let text = next_steps("medqa", Some("a b"), Path::new("my runs"));
        assert!(text.contains("medqa chat --model 'a b' --adapter 'my runs/adapter'"), "{text}");
    }
}
