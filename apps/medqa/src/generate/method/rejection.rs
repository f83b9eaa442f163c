//! Rejection sampling: several answers to each question, a score for each by a judge, and the best one is kept. The best
//! and the worst answer also make a pair for the training of preferences.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, ItemResult, RequestOrigin, Step},
        filters::FilterRules,
        input::SourceRow,
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method,
    template::fill,
};
use serde_json::json;

/// Answers to a question, and the lowest score that is kept, unless the recipe says otherwise.
const SAMPLES: u32 = 4;
const THRESHOLD: f64 = 7.0;

/// The method `rejection`.
pub(in super::super) struct Rejection {
    pub language: Language,
    pub questions: Vec<SourceRow>,
    pub samples: Option<u32>,
    pub threshold: Option<f64>,
}

/// An answer with its score.
struct ScoredAnswer<'a> {
    answer: &'a ModelAnswer,
    score: f64,
}

impl Rejection {
    fn judge(&self, question: &str, answer: &str) -> Prompt {
        let template = match self.language {
            Language::En => include_str!("../prompts/judge.en.txt"),
            Language::Zh => include_str!("../prompts/judge.zh.txt"),
        };
        let text = fill(template.trim_end(), &[("question", question), ("answer", answer.trim())]);
        Prompt { temperature: 0.0, ..Prompt::user(text, 512) }
    }

    fn choose(&self, question: &str, row: &SourceRow, scored: &[ScoredAnswer]) -> ItemResult {
        let by_score = |a: &&ScoredAnswer, b: &&ScoredAnswer| a.score.total_cmp(&b.score);
        // Of equal scores, the first answer counts.
        let best = scored.iter().rev().max_by(by_score);
        let (Some(best), Some(worst)) = (best, scored.iter().min_by(by_score)) else {
            return ItemResult::rejected("no verdict with a score", question);
        };
        let mean = scored.iter().map(|scored| scored.score).sum::<f64>() / scored.len() as f64;
        let mut draft = Draft::qa(question, &best.answer.text, RequestOrigin::from(best.answer))
            .with_origin("seed_ids", json!([row.place]))
            .with_check("score", best.score)
            .with_check("mean_score", (mean * 1e4).round() / 1e4)
            .with_check("scores", scored.iter().map(|scored| scored.score).collect::<Vec<_>>());
        if best.score < self.threshold.unwrap_or(THRESHOLD) {
            draft.flaw = Some("best answer below the threshold");
        }
        if best.score > worst.score {
            draft.pair = Some(json!({
                "prompt": question,
                "chosen": best.answer.text.trim(),
                "rejected": worst.answer.text.trim(),
                "chosen_score": best.score,
                "rejected_score": worst.score,
            }));
        }
        draft.into()
    }
}

/// Returns the last score from 1 to 10 in double or single brackets.
fn score(text: &str) -> Option<f64> {
    let last = |open: &str, close: &str| {
        let inside = text.rmatch_indices(open).filter_map(|(at, _)| {
            let (inside, _) = text[at + open.len()..].split_once(close)?;
            inside.trim().parse::<f64>().ok().filter(|score| (1.0..=10.0).contains(score))
        });
        inside.into_iter().next()
    };
    last("[[", "]]").or_else(|| last("[", "]"))
}

impl Method for Rejection {
    fn num_items(&self) -> Option<u64> {
        Some(self.questions.len() as u64)
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(row) = usize::try_from(item).ok().and_then(|item| self.questions.get(item)) else {
            return Step::Done(Default::default());
        };
        let question = row.question.trim();
        let (mut rest, mut scored) = (answers.iter(), Vec::new());
        for _ in 0..self.samples.unwrap_or(SAMPLES) {
            let Some(answer) = rest.next() else {
                return Step::Ask(Prompt { temperature: 0.8, ..Prompt::user(question.to_owned(), 1024) });
            };
            let Some(verdict) = rest.next() else { return Step::Ask(self.judge(question, &answer.text)) };
            scored
                .extend(score(&verdict.text).filter(|_| !answer.truncated).map(|score| ScoredAnswer { answer, score }));
        }
        Step::Done(self.choose(question, row, &scored))
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, min_answer: 1, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        let requests = f64::from(2 * self.samples.unwrap_or(SAMPLES));
        ExpectedSize { requests, rows: 0.7, answer_tokens: 250.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    fn method(language: Language) -> Rejection {
        let row =
            SourceRow { place: "line 1".to_owned(), question: "Why do I cough?".to_owned(), answer: String::new() };
        Rejection { language, questions: vec![row], samples: Some(3), threshold: None }
    }

    fn answers(texts: &[&str]) -> Vec<ModelAnswer> {
        let answer = |text: &&str| ModelAnswer {
            text: (*text).to_owned(),
            truncated: false,
            created: None,
            key: (*text).to_owned(),
        };
        texts.iter().map(answer).collect()
    }

    #[test]
    fn prompts_are_the_golden_ones() {
        for language in [Language::En, Language::Zh] {
            let prompt = golden::prompt(method(language).step(0, &answers(&["For many reasons."])));
            golden::check(&format!("judge.{}.txt", language.name()), golden::text(&prompt));
            let question = golden::prompt(method(language).step(0, &[]));
            assert_eq!(golden::text(&question), "Why do I cough?");
        }
    }

    #[test]
    fn the_last_score_counts() {
        for (text, expected) in [
            ("Rating: [[7]]", Some(7.0)),
            ("I thought of [[3]], but: [[8.5]].", Some(8.5)),
            ("[9]", Some(9.0)),
            ("[[11]]", None),
            ("seven", None),
        ] {
            assert_eq!(score(text), expected, "{text}");
        }
    }

    #[test]
    fn the_best_answer_is_kept_with_a_pair() {
        let result = |texts: &[&str]| match method(Language::En).step(0, &answers(texts)) {
            Step::Done(result) => result,
            other => panic!("{other:?}"),
        };
        let kept = result(&["a", "[[6]]", "b", "[[9]]", "c", "[[9]]"]);
        let draft = &kept.drafts[0];
        assert_eq!((draft.answer.as_str(), draft.flaw, draft.request.key.as_str()), ("b", None, "b"));
        let pair = draft.pair.as_ref().unwrap();
        assert_eq!((&pair["chosen"], &pair["rejected"]), (&json!("b"), &json!("a")));
        assert_eq!(draft.checks["mean_score"], 8.0);
        let low = result(&["a", "[[6]]", "b", "none", "c", "[[6]]"]);
        assert_eq!((low.drafts[0].flaw, &low.drafts[0].pair), (Some("best answer below the threshold"), &None));
        assert_eq!(result(&["a", "x", "b", "y", "c", "z"]).rejected[0].reason, "no verdict with a score");
    }
}
