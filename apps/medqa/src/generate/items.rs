//! The items of a generation, each a chain of requests that depends on the journal alone.

use super::{
    answer::ModelAnswer,
    draft::{ItemResult, Step},
    journal::Journal,
    method::Method,
    recipe::GenerateRecipe,
    request::{ModelRequest, RequestPlace},
};

/// The place of an item in its chain.
#[derive(Debug, Default)]
pub(super) struct ItemState {
    answers: Vec<ModelAnswer>,
    /// Step that was asked last.
    step: u64,
    /// Unusable answers to this step.
    attempt: u64,
    asked_again: Vec<&'static str>,
}

/// The next need of an item.
#[derive(Debug)]
pub(super) enum Advance {
    /// The answer to a request that the journal does not have.
    Wants(ModelRequest),
    /// Nothing; its rows are known.
    Finished(ItemResult),
}

impl ItemState {
    /// Takes an item as far as the journal knows the answers.
    pub(super) fn advance(
        &mut self,
        item: u64,
        method: &dyn Method,
        recipe: &GenerateRecipe,
        journal: &Journal,
    ) -> Advance {
        loop {
            let unusable = match method.step(item, &self.answers) {
                Step::Done(result) => {
                    return Advance::Finished(ItemResult {
                        asked_again: std::mem::take(&mut self.asked_again),
                        ..result
                    });
                }
                Step::Unusable(reason) => self.answers.pop().map(|answer| (reason, answer.text)),
                Step::Ask(prompt) => {
                    let step = self.answers.len() as u64;
                    if step != self.step {
                        (self.step, self.attempt) = (step, 0);
                    }
                    let place = RequestPlace { item, step, attempt: self.attempt };
                    let request = ModelRequest::new(prompt, recipe, place);
                    let Some(body) = journal.answer(&request.key) else { return Advance::Wants(request) };
                    match ModelAnswer::read(body, &request.key) {
                        Ok(answer) => {
                            self.answers.push(answer);
                            None
                        }
                        Err(reason) => Some((reason, body["choices"].to_string())),
                    }
                }
            };
            let Some((reason, text)) = unusable else { continue };
            if self.attempt > 0 {
                let asked_again = std::mem::take(&mut self.asked_again);
                return Advance::Finished(ItemResult { asked_again, ..ItemResult::rejected(reason, text) });
            }
            self.asked_again.push(reason);
            self.attempt += 1;
        }
    }
}
