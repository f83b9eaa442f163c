//! Self-chat, as Baize did: one request asks for a whole dialogue that begins with a given question.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, RequestOrigin, Step},
        filters::FilterRules,
        input::SourceRow,
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method,
    template::fill,
};
use serde_json::{Map, json};

/// Questions of a dialogue, unless the recipe says otherwise, and the fewest of a dialogue that is kept.
const ROUNDS: u32 = 3;
const FEWEST_ROUNDS: usize = 2;
/// The markers of the turns.
const USER: &str = "[Human]";
const ASSISTANT: &str = "[AI]";

/// The method `self-chat`.
pub(in super::super) struct SelfChat {
    pub language: Language,
    pub questions: Vec<SourceRow>,
    pub rounds: Option<u32>,
}

/// A turn of a transcript.
struct TranscriptTurn<'a> {
    is_user: bool,
    text: &'a str,
}

/// Splits a transcript at its markers. The end is cut off so that the last turn is a complete one of the assistant.
fn turns(text: &str, truncated: bool) -> Vec<TranscriptTurn<'_>> {
    let mut turns: Vec<TranscriptTurn> = Vec::new();
    let mut rest = text;
    let marker = |text: &str| [USER, ASSISTANT].into_iter().filter_map(|m| Some((text.find(m)?, m))).min();
    while let Some((at, marker_here)) = marker(rest) {
        let after = &rest[at + marker_here.len()..];
        let end = marker(after).map_or(after.len(), |(end, _)| end);
        let text = after[..end].trim().trim_start_matches([':', '：']).trim();
        turns.push(TranscriptTurn { is_user: marker_here == USER, text });
        rest = &after[end..];
    }
    if truncated {
        turns.pop();
    }
    while turns.last().is_some_and(|turn| turn.is_user || turn.text.is_empty()) {
        turns.pop();
    }
    turns
}

impl Method for SelfChat {
    fn num_items(&self) -> Option<u64> {
        Some(self.questions.len() as u64)
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(row) = usize::try_from(item).ok().and_then(|item| self.questions.get(item)) else {
            return Step::Done(Default::default());
        };
        let Some(answer) = answers.first() else {
            let template = match self.language {
                Language::En => include_str!("../prompts/self-chat.en.txt"),
                Language::Zh => include_str!("../prompts/self-chat.zh.txt"),
            };
            let rounds = self.rounds.unwrap_or(ROUNDS).to_string();
            let text = fill(template.trim_end(), &[("rounds", &rounds), ("question", row.question.trim())]);
            return Step::Ask(Prompt::user(text, 2048));
        };
        let turns = turns(&answer.text, answer.truncated);
        let alternating = turns.iter().enumerate().all(|(index, turn)| turn.is_user == (index % 2 == 0));
        if turns.len() < 2 * FEWEST_ROUNDS {
            return Step::Unusable("fewer than two rounds of dialogue");
        }
        if !alternating || turns.iter().any(|turn| turn.text.is_empty()) {
            return Step::Unusable("turns that do not alternate");
        }
        let role = |turn: &TranscriptTurn| if turn.is_user { "user" } else { "assistant" };
        let messages = turns.iter().map(|turn| json!({"role": role(turn), "content": turn.text}));
        let mut columns = Map::new();
        columns.insert("messages".to_owned(), messages.collect());
        let learned: Vec<_> = turns.iter().filter(|turn| !turn.is_user).map(|turn| turn.text).collect();
        let draft = Draft {
            columns,
            question: turns.first().map(|turn| turn.text.to_owned()).unwrap_or_default(),
            answer: learned.join("\n"),
            request: RequestOrigin::from(answer),
            ..Draft::default()
        };
        Step::Done(draft.with_origin("seed_ids", json!([row.place])).into())
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, min_answer: 2, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 1.0, rows: 0.9, answer_tokens: 600.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    fn method(language: Language) -> SelfChat {
        let row =
            SourceRow { place: "line 1".to_owned(), question: "Why do I cough?".to_owned(), answer: String::new() };
        SelfChat { language, questions: vec![row], rounds: None }
    }

    fn messages(text: &str, truncated: bool) -> Result<Vec<String>, &'static str> {
        let answer = ModelAnswer { text: text.to_owned(), truncated, created: None, key: "k".to_owned() };
        match method(Language::En).step(0, &[answer]) {
            Step::Done(result) => {
                let messages = result.drafts[0].columns["messages"].as_array().unwrap().clone();
                Ok(messages
                    .iter()
                    .map(|m| format!("{}: {}", m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
                    .collect())
            }
            Step::Unusable(reason) => Err(reason),
            Step::Ask(_) => panic!("one request is enough"),
        }
    }

    #[test]
    fn prompts_are_the_golden_ones() {
        for language in [Language::En, Language::Zh] {
            let prompt = golden::prompt(method(language).step(0, &[]));
            golden::check(&format!("self-chat.{}.txt", language.name()), golden::text(&prompt));
        }
    }

    #[test]
    fn a_transcript_becomes_messages() {
        let text = "Sure.\n[Human] Why do I cough?\n[AI] For many reasons.\n[Human]: And at night?\n[AI]: Then too.\n[Human] Tha";
        let expected =
            ["user: Why do I cough?", "assistant: For many reasons.", "user: And at night?", "assistant: Then too."];
        assert_eq!(messages(text, true).unwrap(), expected);
        assert_eq!(messages(text, false).unwrap(), expected);
        assert_eq!(
            messages("[Human] a b c\n[AI] d\n[Human] e\n[AI] f g", true),
            Err("fewer than two rounds of dialogue")
        );
        assert_eq!(messages("[Human] a\n[Human] b\n[AI] c\n[AI] d", false), Err("turns that do not alternate"));
        assert_eq!(messages("Nothing.", false), Err("fewer than two rounds of dialogue"));
    }
}
