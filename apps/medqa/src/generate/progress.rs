//! The line of progress of a generation.

use super::counts::GenerationCounts;
use indicatif::ProgressBar;
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

/// The time between two lines where stderr is no terminal.
const INTERVAL: Duration = Duration::from_secs(15);

/// A line that is renewed on a terminal, and otherwise printed anew from time to time.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    shown: Instant,
}

impl Progress {
    /// Creates the line; nothing is shown yet.
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Self { bar, shown: Instant::now() }
    }

    /// Shows the counts.
    pub(super) fn show(&mut self, counts: &GenerationCounts, wanted: Option<u64>, spent: &str) {
        let line = || describe(counts, wanted, spent);
        match &self.bar {
            Some(bar) => {
                bar.set_message(line());
                bar.tick();
            }
            None if self.shown.elapsed() >= INTERVAL => {
                eprintln!("{}", line());
                self.shown = Instant::now();
            }
            None => {}
        }
    }

    /// Removes the line from a terminal.
    pub(super) fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn describe(counts: &GenerationCounts, wanted: Option<u64>, spent: &str) -> String {
    let mut removed: Vec<_> = counts.removed.iter().collect();
    removed.sort_by_key(|(reason, count)| (std::cmp::Reverse(**count), reason.as_str()));
    let removed: Vec<_> = removed.iter().take(3).map(|(reason, count)| format!("{reason} {count}")).collect();
    let wanted = wanted.map(|wanted| format!(" of {wanted}")).unwrap_or_default();
    let removed = if removed.is_empty() { String::new() } else { format!("; removed: {}", removed.join(", ")) };
    format!("{}{wanted} rows{removed}; spent: {spent}", counts.rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_rows_reasons_and_what_is_spent() {
        let mut counts = GenerationCounts { rows: 7, ..GenerationCounts::default() };
        assert_eq!(describe(&counts, None, "1 requests"), "7 rows; spent: 1 requests");
        counts.removed = [("a", 1), ("b", 9), ("c", 2), ("d", 3)].map(|(k, n)| (k.to_owned(), n)).into();
        assert_eq!(describe(&counts, Some(9), "x"), "7 of 9 rows; removed: b 9, d 3, c 2; spent: x");
    }
}
