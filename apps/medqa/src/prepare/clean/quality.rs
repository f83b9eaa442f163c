//! Reasons to leave a row out: what is missing, too short or repeats itself.

use crate::prepare::{
    texts::RowTexts,
    units::{Units, is_han},
};
use std::collections::HashMap;

/// Bounds of the texts of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct TextBounds {
    /// Characters of a question.
    pub min_question: usize,
    /// Words or Han characters of an answer.
    pub min_answer: usize,
    /// Characters of all texts of a row.
    pub max_chars: Option<usize>,
}

/// Returns why a row should be left out; none if it is good.
pub(super) fn reason(texts: &RowTexts, has_answer: bool, bounds: TextBounds) -> Option<&'static str> {
    let question_chars = texts.question.chars().filter(|c| !c.is_whitespace()).count();
    // A Han character says as much as two letters.
    let weight = question_chars + texts.question.chars().filter(|c| is_han(*c)).count();
    if question_chars == 0 {
        return Some("empty question");
    }
    if weight < bounds.min_question {
        return Some("short question");
    }
    if has_answer {
        if texts.answer.trim().is_empty() {
            return Some("empty answer");
        }
        if bounds.min_answer > 1 && Units::of(&texts.answer).len() < bounds.min_answer {
            return Some("short answer");
        }
    }
    if bounds.max_chars.is_some_and(|max| texts.all.chars().count() > max) {
        return Some("too long");
    }
    let text = if has_answer { &texts.answer } else { &texts.question };
    repeats(text).then_some("repetition")
}

/// Returns whether a text repeats lines or one pair of words, by the limits of Gopher and FineWeb, or has more marks
/// such as `#` than a tenth of its words.
fn repeats(text: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.len() > 3).collect();
    if lines.len() >= 4 {
        let mut distinct = lines.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if (lines.len() - distinct.len()) as f64 > 0.3 * lines.len() as f64 {
            return true;
        }
    }
    let units = Units::of(text);
    if units.len() < 30 {
        return false;
    }
    let mut pairs: HashMap<u64, usize> = HashMap::new();
    units.grams(2, 0).into_iter().for_each(|pair| *pairs.entry(pair).or_default() += 1);
    let most = pairs.values().copied().max().unwrap_or(0);
    let marks = text.matches(['#', '…']).count() + text.matches("...").count();
    most * 2 > units.len() / 5 && most > 5 || marks * 10 > units.len()
}

/// Returns whether a text looks as if its encoding was taken for another one: `Ã©` in place of `é`.
pub(super) fn is_mojibake(text: &str) -> bool {
    let marks = ["Ã¤", "Ã¶", "Ã¼", "Ã©", "Ã¨", "Ã±", "â€", "Â°", "Âµ", "ï¼", "ã€"];
    let found: usize = marks.iter().map(|mark| text.matches(mark).count()).sum();
    found * 200 > text.chars().count()
}

/// Returns the language of a text by its script, and for Latin letters by their frequency: an ISO 639-1 code, or `other`.
pub(in crate::prepare) fn language(text: &str) -> &'static str {
    let (mut letters, mut han, mut kana, mut hangul) = (0, 0, 0, 0);
    for c in text.chars().filter(|c| c.is_alphabetic()) {
        letters += 1;
        han += usize::from(is_han(c));
        kana += usize::from(('\u{3040}'..='\u{30ff}').contains(&c));
        hangul += usize::from(('\u{ac00}'..='\u{d7af}').contains(&c));
    }
    if kana * 10 >= letters && kana > 0 {
        return "ja";
    }
    if hangul * 10 >= letters * 3 && hangul > 0 {
        return "ko";
    }
    if han * 10 >= letters * 3 && han > 0 {
        return "zh";
    }
    let Some(found) = whatlang::detect(text) else { return "other" };
    match found.lang() {
        whatlang::Lang::Eng => "en",
        // A few words are not enough to tell Latin languages apart.
        _ if found.script() == whatlang::Script::Latin && !found.is_reliable() => "en",
        whatlang::Lang::Deu => "de",
        whatlang::Lang::Fra => "fr",
        whatlang::Lang::Spa => "es",
        whatlang::Lang::Por => "pt",
        whatlang::Lang::Ita => "it",
        whatlang::Lang::Rus => "ru",
        whatlang::Lang::Ara => "ar",
        whatlang::Lang::Hin => "hi",
        whatlang::Lang::Vie => "vi",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_left_out_for_a_reason() {
        let bounds = TextBounds { min_question: 4, min_answer: 2, max_chars: Some(1000) };
        let texts = |question: &str, answer: &str| RowTexts {
            question: question.to_owned(),
            answer: answer.to_owned(),
            all: format!("{question}\n{answer}"),
        };
        for (question, answer, expected) in [
            ("What is asthma?", "A disease of the airways.", None),
            ("发烧", "多喝水。", None),
            (" ", "a b", Some("empty question")),
            ("Eh?", "a b", Some("short question")),
            ("What is it?", "\n", Some("empty answer")),
            ("What is it?", "Yes", Some("short answer")),
            ("What is it?", &"word and more ".repeat(90), Some("too long")),
            ("What is it?", &"drink water ".repeat(30), Some("repetition")),
            ("What is it?", "Line one.\nLine one.\nLine one.\nLine two.", Some("repetition")),
        ] {
            assert_eq!(reason(&texts(question, answer), true, bounds), expected, "{question} {answer}");
        }
        assert!(is_mojibake("cafÃ© au lait") && !is_mojibake("café au lait"));
        let languages = [
            ("什么是哮喘", "zh"),
            ("喘息とは何ですか", "ja"),
            ("천식이란 무엇입니까", "ko"),
            ("What is asthma?", "en"),
        ];
        languages.iter().for_each(|(text, expected)| assert_eq!(language(text), *expected, "{text}"));
    }
}
