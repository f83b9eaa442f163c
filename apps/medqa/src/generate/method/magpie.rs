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
                Step::Ask(Prompt { text, temperature: 0.0, max_tokens: 192, stop: Vec::new(), schema: None })
            }
            [question, answer, ..] => {
                let mut draft = Draft::qa(&question.text, &answer.text, RequestOrigin::from(answer));
                draft.flaw = answer.truncated.then_some("answer cut off at its limit");
                Step::Done(draft.into())
            }
        }
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, max_rouge: Some(0.7), min_answer: 3, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 2.0, rows: 0.3, answer_tokens: 90.0 }
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
        let Step::Done(result) = method.step(0, &[answer("What is it?", false), answer("A cold", true)]) else {
            panic!("a row follows")
        };
        assert_eq!(result.drafts[0].flaw, Some("answer cut off at its limit"));
    }
}
