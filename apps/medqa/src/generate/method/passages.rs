//! Questions and answers about passages of a text. An answer must be supported by its passage, and a question must be
//! understood without it.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, Step},
        filters::FilterRules,
        input::SourceRow,
        recipe::Language,
        request::Prompt,
        support::Unsupported,
    },
    ExpectedSize, Method, qa_items,
    template::fill,
};
use serde_json::json;

/// Longest passage, unless the recipe says otherwise, in characters.
const CHUNK_CHARACTERS: usize = 2000;
/// Characters of a passage for each question, and the most questions.
const CHARACTERS_PER_QUESTION: usize = 240;
const MAX_QUESTIONS: usize = 8;
/// Passages with fewer characters are left out.
const SHORTEST: usize = 40;

/// Words of questions that are understood only with the passage.
const POINTERS: [&str; 16] = [
    "the passage",
    "the text",
    "this text",
    "the article",
    "the author",
    "the excerpt",
    "the above",
    "according to the",
    "上文",
    "本文",
    "文中",
    "根据材料",
    "上述",
    "这段",
    "该段",
    "文章",
];

/// A passage of the input.
#[derive(Debug, Clone, PartialEq)]
struct Passage {
    text: String,
    /// Row of the input, and the first and last character of the passage in its text.
    place: String,
    start: usize,
    end: usize,
}

/// The method `passages`.
pub(in super::super) struct Passages {
    language: Language,
    passages: Vec<Passage>,
}

impl Passages {
    /// Cuts the texts of the input into passages of at most `longest` characters.
    pub(in super::super) fn new(language: Language, rows: &[SourceRow], longest: Option<usize>) -> Self {
        let longest = longest.unwrap_or(CHUNK_CHARACTERS).max(SHORTEST);
        Self { language, passages: rows.iter().flat_map(|row| cut(row, longest)).collect() }
    }

    fn prompt(&self, passage: &Passage) -> String {
        let template = match self.language {
            Language::En => include_str!("../prompts/passages.en.txt"),
            Language::Zh => include_str!("../prompts/passages.zh.txt"),
        };
        let count = (passage.text.chars().count() / CHARACTERS_PER_QUESTION).clamp(1, MAX_QUESTIONS).to_string();
        fill(template.trim_end(), &[("count", &count), ("passage", &passage.text)])
    }

    fn check(passage: &Passage, draft: Draft) -> Draft {
        let unsupported = Unsupported::find(&draft.answer, &passage.text);
        let lower = draft.question.to_lowercase();
        let pointer = POINTERS.iter().find(|pointer| lower.contains(**pointer));
        let flaw = unsupported.reason().or_else(|| pointer.map(|_| "question that needs its passage"));
        let mut draft = draft
            .with_origin("passage", json!({"row": passage.place, "start": passage.start, "end": passage.end}))
            .with_check("unsupported_numbers", unsupported.numbers)
            .with_check("unsupported_drugs", unsupported.drugs);
        draft.flaw = flaw;
        draft
    }
}

/// Cuts a text at ends of paragraphs and sentences, and a sentence that is too long anywhere.
fn cut(row: &SourceRow, longest: usize) -> Vec<Passage> {
    let characters: Vec<char> = row.answer.chars().collect();
    let (mut passages, mut start) = (Vec::new(), 0);
    while start < characters.len() {
        let most = (start + longest).min(characters.len());
        let last = |is_end: fn(char, char) -> bool| {
            let pair = |at: &usize| is_end(characters[at - 1], characters.get(*at).copied().unwrap_or('\n'));
            (start + longest / 2..most).rev().filter(|at| *at > start).find(pair)
        };
        let end = if most == characters.len() {
            most
        } else {
            last(|before, at| before == '\n' && at == '\n')
                .or_else(|| last(|before, _| before == '\n'))
                .or_else(|| {
                    last(|before, at| "。！？".contains(before) || ".!?".contains(before) && at.is_whitespace())
                })
                .unwrap_or(most)
        };
        let text: String = characters[start..end].iter().collect();
        let text = text.trim().to_owned();
        if text.chars().count() >= SHORTEST {
            passages.push(Passage { text, place: row.place.clone(), start, end });
        }
        start = end;
    }
    passages
}

impl Method for Passages {
    fn num_items(&self) -> Option<u64> {
        Some(self.passages.len() as u64)
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(passage) = usize::try_from(item).ok().and_then(|item| self.passages.get(item)) else {
            return Step::Done(Default::default());
        };
        let Some(answer) = answers.first() else {
            let prompt = Prompt::user(self.prompt(passage), 2048).with_schema(qa_items::schema());
            return Step::Ask(Prompt { temperature: 0.7, ..prompt });
        };
        match qa_items::read(answer) {
            Err(reason) => Step::Unusable(reason),
            Ok(mut result) => {
                result.drafts = result.drafts.into_iter().map(|draft| Self::check(passage, draft)).collect();
                Step::Done(result)
            }
        }
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, min_answer: 1, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 1.0, rows: 3.0, answer_tokens: 300.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    fn row(text: &str) -> SourceRow {
        SourceRow { place: "line 1".to_owned(), question: String::new(), answer: text.to_owned() }
    }

    #[test]
    fn texts_are_cut_at_sentences_and_nothing_is_lost() {
        let text = "One sentence about the heart is here. ".repeat(30)
            + "\n\n"
            + &"心脏是一个器官，它推动血液流动。".repeat(40);
        let passages = cut(&row(&text), 200);
        assert!(passages.len() > 5 && passages.iter().all(|p| p.text.chars().count() <= 200));
        assert!(passages.iter().all(|p| p.text.ends_with(['.', '。'])), "{passages:?}");
        let whole: String = passages.iter().map(|p| p.text.replace(' ', "")).collect();
        assert_eq!(whole, text.replace([' ', '\n'], ""));
        let endless = cut(&row(&"x".repeat(450)), 200);
        assert_eq!(endless.iter().map(|p| (p.start, p.end)).collect::<Vec<_>>(), [(0, 200), (200, 400), (400, 450)]);
    }

    #[test]
    fn prompts_are_the_golden_ones() {
        for (language, text) in [
            (Language::En, "The heart pumps blood through the body. It beats about 70 times a minute at rest."),
            (
                Language::Zh,
                "心脏推动血液在全身流动。成年人安静时每分钟大约跳动七十次，运动时会明显加快，睡眠时则会减慢。",
            ),
        ] {
            let method = Passages::new(language, &[row(text)], None);
            let prompt = golden::prompt(method.step(0, &[]));
            golden::check(&format!("passages.{}.txt", language.name()), golden::text(&prompt));
        }
    }

    #[test]
    fn answers_that_the_passage_does_not_support_are_removed() {
        let method =
            Passages::new(Language::En, &[row("Give 5 mg of ramipril once a day to adults with hypertension.")], None);
        let text = json!([
            {"question": "How much ramipril do adults take?", "answer": "5 mg once a day."},
            {"question": "How much ramipril do adults need?", "answer": "10 mg once a day."},
            {"question": "Which drug helps adults?", "answer": "Atenolol."},
            {"question": "What does the passage say?", "answer": "5 mg."},
        ]);
        let answer = ModelAnswer { text: text.to_string(), truncated: false, created: None, key: "k".to_owned() };
        let Step::Done(result) = method.step(0, &[answer]) else { panic!("rows follow") };
        let flaws: Vec<_> = result.drafts.iter().map(|draft| draft.flaw).collect();
        assert_eq!(
            flaws,
            [
                None,
                Some("a number that the source does not have"),
                Some("a drug that the source does not name"),
                Some("question that needs its passage")
            ]
        );
        assert_eq!(result.drafts[1].checks["unsupported_numbers"], json!(["10"]));
    }
}
