//! Asking the unseen questions, before and after.

use super::lessons::{Kind, Lesson, Split, headed, refused};
use crate::{
    backend::{Device, on},
    cli::ModelArgs,
    model::{self, conversation},
};
use anyhow::Result;
use burn::tensor::DType;
use burn_llama::{Generate, Message, Settings, Tokenizer, kernel::Kernels};

/// Questions whose answers are printed: medical, other.
const SHOWN: (usize, usize) = (2, 1);
/// Further questions whose answers are only judged: medical, other.
const JUDGED: (usize, usize) = (8, 4);

/// The questions that are asked.
pub struct Questions<'a> {
    /// Those whose answers are printed, then those whose answers are judged.
    lessons: Vec<&'a Lesson>,
}

/// What a model said.
pub struct Answers {
    /// One per question that is shown.
    pub shown: Vec<String>,
    /// Of the judged medical questions, those answered under the four headings, and all.
    pub format: (usize, usize),
    /// Of the judged other questions, those declined, and all.
    pub refusals: (usize, usize),
}

impl<'a> Questions<'a> {
    /// The questions among `lessons` that nothing is trained on.
    pub fn among(lessons: &'a [Lesson]) -> Self {
        let unseen = |kind| lessons.iter().filter(move |lesson| (lesson.split, lesson.kind) == (Split::Unseen, kind));
        let part = |(medical, other): (usize, usize), skip: (usize, usize)| {
            let other = unseen(Kind::Other).skip(skip.1).take(other);
            unseen(Kind::Medical).skip(skip.0).take(medical).chain(other).collect::<Vec<_>>()
        };
        Self { lessons: [part(SHOWN, (0, 0)), part(JUDGED, SHOWN)].concat() }
    }

    /// The questions whose answers are printed.
    pub fn shown(&self) -> impl Iterator<Item = &str> {
        self.lessons.iter().take(SHOWN.0 + SHOWN.1).map(|lesson| lesson.question.as_str())
    }

    /// Asks a model all of them in one batch; it always takes the likeliest token.
    pub fn ask(&self, args: &ModelArgs, device: &Device) -> Result<Answers> {
        eprintln!("asking {} unseen questions", self.lessons.len());
        on!(device, |B, place| self.ask_on::<B>(args, place))
    }

    fn ask_on<B: Kernels>(&self, args: &ModelArgs, device: &B::Device) -> Result<Answers> {
        let loaded = model::load::<B>(args, DType::F32, device)?;
        let settings = Settings {
            max_new_tokens: self.room(&loaded.tokenizer)?,
            eos: loaded.tokenizer.eos_ids().to_vec(),
            ..Settings::default()
        };
        let prompt =
            |lesson: &&Lesson| conversation(&loaded.tokenizer, &[Message::new("user", lesson.question.as_str())]);
        let prompts = self.lessons.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let rows = Generate::new(&loaded.model, &prompts, &settings)?.finish()?;
        let texts = rows.iter().map(|ids| Ok(loaded.tokenizer.decode(ids, true)?));
        Ok(self.judge(texts.collect::<Result<Vec<_>>>()?))
    }

    /// Tokens enough for every answer that a lesson asks for, half as much again.
    fn room(&self, tokenizer: &Tokenizer) -> Result<usize> {
        let lengths = self.lessons.iter().map(|lesson| Ok(tokenizer.encode(&lesson.answer, false)?.len()));
        Ok(lengths.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0) * 3 / 2)
    }

    fn judge(&self, mut texts: Vec<String>) -> Answers {
        let judged = texts.split_off(SHOWN.0 + SHOWN.1);
        let pairs = || self.lessons.iter().skip(SHOWN.0 + SHOWN.1).zip(&judged);
        let count = |kind, right: fn(&str) -> bool| {
            let texts: Vec<_> = pairs().filter(|(lesson, _)| lesson.kind == kind).map(|(_, text)| text).collect();
            (texts.iter().filter(|text| right(text)).count(), texts.len())
        };
        Answers {
            format: count(Kind::Medical, |text| headed(text).is_some()),
            refusals: count(Kind::Other, |text| refused(text).is_some()),
            shown: texts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lessons, *};

    #[test]
    fn right_answers_are_counted_and_others_are_not() {
        let lessons = lessons::all().unwrap();
        let questions = Questions::among(&lessons);
        let right: Vec<_> = questions.lessons.iter().map(|lesson| lesson.answer.clone()).collect();
        let judged = questions.judge(right.clone());
        assert_eq!((judged.format, judged.refusals), ((8, 8), (4, 4)));
        assert_eq!(judged.shown.len(), questions.shown().count());
        // A refusal is no answer to a medical question, nor four headings a refusal.
        let swapped: Vec<_> = right.into_iter().rev().collect();
        let judged = questions.judge(swapped);
        assert!(judged.format.0 < 8 && judged.refusals.0 < 4, "{:?} {:?}", judged.format, judged.refusals);
    }
}
