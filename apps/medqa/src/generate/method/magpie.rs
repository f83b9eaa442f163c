//! Magpie: a chat model that is given only what its template puts before the text of a user writes that text itself.
//! Its answer to the question is asked for as usual.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, RequestOrigin, Step},
        filters::FilterRules,
        recipe::Language,
        request::{Prompt, PromptMessage, PromptText},
    },
    ExpectedSize, Method,
};
use crate::template;
use anyhow::{Context, Result};
use burn_llama::{Message, Tokenizer};

/// A text that stands for the user's in a rendered template.
const MARK: &str = "\u{e000}question\u{e000}";

/// The method `magpie`.
pub(in super::super) struct Magpie {
    language: Language,
    /// System line that names the field of the questions.
    system: Option<String>,
    /// Text that the template puts before the user's.
    prefix: String,
    /// Texts that end the user's.
    stop: Vec<String>,
}

impl Magpie {
    /// Creates the method for a model's chat template.
    ///
    /// # Errors
    /// If the tokenizer has no template, or the template does not print the text of a user.
    pub(in super::super) fn new(tokenizer: &Tokenizer, language: Language, system: Option<&str>) -> Result<Self> {
        let template = template::chat_template(tokenizer)?;
        let system = system.filter(|text| !text.trim().is_empty()).map(str::to_owned);
        let mut messages: Vec<_> = system.iter().map(|text| Message::new("system", text.as_str())).collect();
        messages.push(Message::new("user", MARK));
        let text = template.render(&messages, None, false)?;
        let (prefix, after) = text.split_once(MARK).with_context(|| {
            format!("{}: the chat template does not print the text of a user", tokenizer.path().display())
        })?;
        let after: String = after.lines().next().unwrap_or_default().to_owned();
        let stop = ["\n".to_owned(), "assistant".to_owned(), after].into_iter().filter(|stop| !stop.is_empty());
        Ok(Self { language, system, prefix: prefix.to_owned(), stop: stop.collect() })
    }
}

/// Returns the complete sentences and list items at the beginning of a text that was cut off.
fn complete_sentences(text: &str) -> &str {
    let is_end = |(at, c): (usize, char)| {
        let (before, after) = (text[..at].chars().next_back(), text[at + c.len_utf8()..].chars().next());
        let end = match c {
            '。' | '！' | '？' => true,
            // The point behind the number of a list item ends nothing.
            '.' => after.is_some_and(char::is_whitespace) && !before.is_some_and(|c| c.is_ascii_digit()),
            '!' | '?' => after.is_some_and(char::is_whitespace),
            _ => false,
        };
        end.then_some(at + c.len_utf8())
    };
    let end = text.char_indices().rev().find_map(is_end).unwrap_or(0);
    &text[..end]
}

impl Method for Magpie {
    fn num_items(&self) -> Option<u64> {
        None
    }

    fn step(&self, _item: u64, answers: &[ModelAnswer]) -> Step {
        match answers {
            [] => Step::Ask(Prompt {
                text: PromptText::Raw(self.prefix.clone()),
                temperature: 1.0,
                max_tokens: 96,
                stop: self.stop.clone(),
                schema: None,
            }),
            [question] if question.truncated => Step::Unusable("a question without an end"),
            [question] => {
                let system = self.system.iter().map(|text| PromptMessage { role: "system", text: text.clone() });
                let user = PromptMessage { role: "user", text: question.text.trim().to_owned() };
                let text = PromptText::Messages(system.chain([user]).collect());
                Step::Ask(Prompt { text, temperature: 0.0, max_tokens: 128, stop: Vec::new(), schema: None })
            }
            [question, answer, ..] => {
                let whole = if answer.truncated { complete_sentences(&answer.text) } else { &answer.text };
                let draft = Draft::qa(&question.text, whole, RequestOrigin::from(answer));
                let mut draft = draft.with_check("shortened", whole.len() < answer.text.len());
                draft.flaw = whole.is_empty().then_some("answer cut off in its first sentence");
                Step::Done(draft.into())
            }
        }
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, max_rouge: Some(0.7), min_answer: 3, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 2.0, rows: 0.7, answer_tokens: 75.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, truncated: bool) -> ModelAnswer {
        ModelAnswer { text: text.to_owned(), truncated, created: None, key: "k".to_owned() }
    }

    #[test]
    fn a_question_is_continued_and_then_answered() {
        let method = Magpie {
            language: Language::En,
            system: Some("You answer medical questions.".to_owned()),
            prefix: "<|im_start|>user\n".to_owned(),
            stop: vec!["\n".to_owned()],
        };
        let Step::Ask(prompt) = method.step(0, &[]) else { panic!("a question is asked for") };
        assert_eq!(prompt.text, PromptText::Raw("<|im_start|>user\n".to_owned()));
        let Step::Ask(prompt) = method.step(0, &[answer(" What is it? ", false)]) else { panic!("an answer follows") };
        let PromptText::Messages(messages) = prompt.text else { panic!("the answer is that of a chat") };
        assert_eq!(
            messages.iter().map(|m| m.text.as_str()).collect::<Vec<_>>(),
            ["You answer medical questions.", "What is it?"]
        );
        for (text, kept, flaw) in [
            ("A cold. It passes.\n\n1. Rest. 2. Dri", "A cold. It passes.\n\n1. Rest.", None),
            ("感冒。会好的。多喝", "感冒。会好的。", None),
            ("A cold", "", Some("answer cut off in its first sentence")),
        ] {
            let Step::Done(result) = method.step(0, &[answer("What is it?", false), answer(text, true)]) else {
                panic!("a row follows")
            };
            assert_eq!((result.drafts[0].answer.as_str(), result.drafts[0].flaw), (kept, flaw));
        }
    }
}
