//! Filters of rows. They look at the rows kept before, so they run in the order of the items.

use super::{draft::Draft, recipe::Language, request::is_han};
use std::collections::{HashMap, HashSet};

/// The rules of a method for its rows.
#[derive(Debug, Clone, Default)]
pub(super) struct FilterRules {
    pub language: Language,
    /// Highest ROUGE-L between a question and an earlier one.
    pub max_rouge: Option<f64>,
    /// Questions that rows must differ from.
    pub known: Vec<String>,
    /// Rules for instructions that a text model is to follow (Alpaca's).
    pub is_instruction: bool,
    /// Fewest words of an answer, or characters in Chinese.
    pub min_answer: usize,
}

/// Words of instructions that a text model cannot follow.
const WORDS_EN: [&str; 20] = [
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "photo",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "video",
    "videos",
    "audio",
    "music",
    "flowchart",
    "diagram",
    "diagrams",
];
const WORDS_ZH: [&str; 10] = ["图片", "图表", "图像", "照片", "视频", "音频", "文件", "画出", "画一", "地图"];

/// The filters, with the questions kept so far.
pub(super) struct RowFilters {
    rules: FilterRules,
    seen: HashSet<String>,
    /// Token ids of every question that others are compared with.
    questions: Vec<Vec<u32>>,
    ids: HashMap<String, u32>,
}

impl RowFilters {
    /// Creates the filters of a method.
    pub(super) fn new(rules: FilterRules) -> Self {
        let known = rules.known.clone();
        let mut filters = Self { rules, seen: HashSet::new(), questions: Vec::new(), ids: HashMap::new() };
        known.iter().for_each(|question| filters.remember(question));
        filters
    }

    /// Returns the rules.
    pub(super) fn rules(&self) -> &FilterRules {
        &self.rules
    }

    /// Returns the reason to remove a row; a row without one is remembered.
    pub(super) fn refuses(&mut self, draft: &mut Draft) -> Option<&'static str> {
        let reason = draft.flaw.or_else(|| self.flaw(draft)).or_else(|| self.resembles(draft));
        if reason.is_none() {
            self.remember(&draft.question.clone());
        }
        reason
    }

    fn flaw(&self, draft: &Draft) -> Option<&'static str> {
        let (question, answer) = (draft.question.trim(), draft.answer.trim());
        let zh = self.rules.language == Language::Zh;
        let size = |text: &str| if zh { text.chars().count() } else { text.split_whitespace().count() };
        let most = if zh { 300 } else { 150 };
        if question.is_empty() {
            return Some("empty question");
        }
        if answer.is_empty() {
            return Some("empty answer");
        }
        if size(question) < 3 {
            return Some("question too short");
        }
        if size(question) > most {
            return Some("question too long");
        }
        if size(answer) < self.rules.min_answer {
            return Some("answer too short");
        }
        if repeats(answer) {
            return Some("answer repeats itself");
        }
        if self.rules.is_instruction { self.instruction_flaw(question) } else { None }
    }

    fn instruction_flaw(&self, question: &str) -> Option<&'static str> {
        let first = question.chars().next().unwrap_or(' ');
        if first.is_ascii_punctuation() {
            return Some("begins with punctuation");
        }
        let lower = question.to_lowercase();
        let impossible = match self.rules.language {
            Language::En => {
                if !first.is_ascii() {
                    return Some("begins in another script");
                }
                let words = lower.split(|c: char| !c.is_alphanumeric());
                words.into_iter().any(|word| WORDS_EN.contains(&word)) || lower.starts_with("write a program")
            }
            Language::Zh => WORDS_ZH.iter().any(|word| lower.contains(word)),
        };
        impossible.then_some("asks for something else than text")
    }

    fn resembles(&mut self, draft: &mut Draft) -> Option<&'static str> {
        if self.seen.contains(&normalized(&draft.question)) {
            return Some("question asked before");
        }
        let limit = self.rules.max_rouge?;
        let tokens = self.tokens(&draft.question);
        let most = self.questions.iter().map(|other| rouge_l(&tokens, other, limit)).fold(0.0, f64::max);
        draft.checks.insert("max_rouge_l".to_owned(), ((most * 1e4).round() / 1e4).into());
        (most > limit).then_some("question resembles another")
    }

    fn remember(&mut self, question: &str) {
        self.seen.insert(normalized(question));
        if self.rules.max_rouge.is_some() {
            let tokens = self.tokens(question);
            self.questions.push(tokens);
        }
    }

    /// Returns the ids of the words of a text, and of each Chinese character.
    fn tokens(&mut self, text: &str) -> Vec<u32> {
        let words = words(text);
        let mut id = |word: String| {
            let new = self.ids.len() as u32;
            *self.ids.entry(word).or_insert(new)
        };
        words.into_iter().map(&mut id).collect()
    }
}

/// Splits a text into words in lower case; a Chinese character is a word.
pub(super) fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in text.chars().flat_map(char::to_lowercase) {
        let last = words.len() - 1;
        if is_han(c) {
            words.extend([c.to_string(), String::new()]);
        } else if c.is_alphanumeric() {
            words[last].push(c);
        } else if !words[last].is_empty() {
            words.push(String::new());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn normalized(text: &str) -> String {
    words(text).join(" ")
}

/// Computes the F measure of ROUGE-L, or 0 if the lengths alone keep it at or below `limit`.
fn rouge_l(a: &[u32], b: &[u32], limit: f64) -> f64 {
    let total = (a.len() + b.len()) as f64;
    if total == 0.0 || 2.0 * a.len().min(b.len()) as f64 / total <= limit {
        return 0.0;
    }
    2.0 * longest_common_subsequence(a, b) as f64 / total
}

fn longest_common_subsequence(a: &[u32], b: &[u32]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row.last().copied().unwrap_or(0)
}

/// Returns whether a text consists mostly of one repeated piece: a group of four words that makes up a third of it.
fn repeats(text: &str) -> bool {
    let words = words(text);
    if words.len() < 24 {
        return false;
    }
    let mut counts = HashMap::new();
    words.windows(4).for_each(|group| *counts.entry(group).or_insert(0_usize) += 1);
    counts.values().any(|&count| count * 4 * 3 > words.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::draft::RequestOrigin;

    fn refuses(filters: &mut RowFilters, question: &str, answer: &str) -> Option<&'static str> {
        filters.refuses(&mut Draft::qa(question, answer, RequestOrigin::default()))
    }

    #[test]
    fn instructions_are_filtered_as_alpaca_does() {
        let known = vec!["Name three causes of chest pain in young adults today".to_owned()];
        let rules = FilterRules { max_rouge: Some(0.7), known, is_instruction: true, ..FilterRules::default() };
        let mut filters = RowFilters::new(rules);
        for (question, answer, expected) in [
            ("Explain what hypertension is to a patient", "It is high pressure.", None),
            ("Explain what hypertension is to a patient!", "Other.", Some("question asked before")),
            ("Explain what hypertension is to a young patient", "Other.", Some("question resembles another")),
            ("Name three causes of chest pain in old adults today", "Some.", Some("question resembles another")),
            ("Why cough", "So.", Some("question too short")),
            ("Why do people cough at night", "", Some("empty answer")),
            ("Draw a diagram of the heart", "Done.", Some("asks for something else than text")),
            ("- List two vitamins here", "A, B.", Some("begins with punctuation")),
            ("列出 two vitamins here", "A, B.", Some("begins in another script")),
            ("Why is a biopsy done", &"no no no no ".repeat(20), Some("answer repeats itself")),
        ] {
            assert_eq!(refuses(&mut filters, question, answer), expected, "{question}");
        }
    }

    #[test]
    fn chinese_is_compared_by_characters() {
        let rules = FilterRules {
            language: Language::Zh,
            max_rouge: Some(0.7),
            is_instruction: true,
            ..FilterRules::default()
        };
        let mut filters = RowFilters::new(rules);
        for (question, expected) in [
            ("高血压患者平时饮食应该注意什么？", None),
            ("高血压患者饮食应该注意什么？", Some("question resembles another")),
            ("糖尿病有哪些早期症状？", None),
            ("请画出心脏的结构", Some("asks for something else than text")),
            ("头痛", Some("question too short")),
        ] {
            assert_eq!(refuses(&mut filters, question, "少吃盐。"), expected, "{question}");
        }
    }

    #[test]
    fn rouge_l_is_that_of_the_longest_common_subsequence() {
        // As rouge_score 0.1.2: "the cat sat on the mat" against "the cat lay on a mat" has 4 words in common.
        let score = |a: &str, b: &str| {
            let mut filters = RowFilters::new(FilterRules::default());
            let (a, b) = (filters.tokens(a), filters.tokens(b));
            rouge_l(&a, &b, 0.0)
        };
        assert!((score("the cat sat on the mat", "the cat lay on a mat") - 2.0 * 4.0 / 12.0).abs() < 1e-12);
        assert_eq!(score("a b", "c d"), 0.0);
        assert_eq!(score("a b", "a b"), 1.0);
    }
}
