//! Asks the unseen questions, before and after fine-tuning.

use super::lessons::{Lesson, LessonKind, LessonSplit, parse_headings, parse_refusal};
use crate::{
    args::ModelArgs,
    backend::{Device, with_backend},
    model::{self, apply_chat_template},
};
use anyhow::Result;
use burn::tensor::DType;
use burn_llama::{Generation, GenerationConfig, Message, Tokenizer, kernel::Kernels};

/// The number of questions whose answers are printed: medical, other.
const SHOWN: (usize, usize) = (2, 1);
/// The number of further questions whose answers are only judged: medical, other.
const JUDGED: (usize, usize) = (8, 4);

/// The questions that are asked.
pub struct Questions<'a> {
    /// Lessons whose answers are printed, then lessons whose answers are judged.
    lessons: Vec<&'a Lesson>,
}

/// The answers of a model.
pub struct Answers {
    /// The answers to the questions that are printed.
    pub shown: Vec<String>,
    /// The number of judged medical questions that were answered under the four headings, and of all of them.
    pub format: (usize, usize),
    /// The number of judged other questions that were declined, and of all of them.
    pub refusals: (usize, usize),
}

impl<'a> Questions<'a> {
    /// Selects the questions among `lessons` that are not trained on.
    pub fn select(lessons: &'a [Lesson]) -> Self {
        let unseen =
            |kind| lessons.iter().filter(move |lesson| (lesson.split, lesson.kind) == (LessonSplit::Unseen, kind));
        let part = |(medical, other): (usize, usize), skip: (usize, usize)| {
            let other = unseen(LessonKind::Other).skip(skip.1).take(other);
            unseen(LessonKind::Medical).skip(skip.0).take(medical).chain(other).collect::<Vec<_>>()
        };
        Self { lessons: [part(SHOWN, (0, 0)), part(JUDGED, SHOWN)].concat() }
    }

    /// Returns the questions whose answers are printed.
    pub fn shown(&self) -> impl Iterator<Item = &str> {
        self.lessons.iter().take(SHOWN.0 + SHOWN.1).map(|lesson| lesson.question.as_str())
    }

    /// Asks a model all questions in one batch, with greedy decoding.
    pub fn ask(&self, args: &ModelArgs, device: &Device) -> Result<Answers> {
        eprintln!("asking {} unseen questions", self.lessons.len());
        with_backend!(device, |B, device| self.ask_on::<B>(args, device))
    }

    fn ask_on<B: Kernels>(&self, args: &ModelArgs, device: &B::Device) -> Result<Answers> {
        let loaded = model::load::<B>(args, DType::F32, device)?;
        let settings = GenerationConfig {
            max_new_tokens: self.max_answer_tokens(&loaded.tokenizer)?,
            eos: loaded.tokenizer.eos_ids().to_vec(),
            ..GenerationConfig::default()
        };
        let prompt = |lesson: &&Lesson| {
            apply_chat_template(&loaded.tokenizer, &[Message::new("user", lesson.question.as_str())])
        };
        let prompts = self.lessons.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let rows = Generation::new(&loaded.model, &prompts, &settings)?.finish()?;
        let texts = rows.iter().map(|ids| Ok(loaded.tokenizer.decode(ids, true)?));
        Ok(self.judge(texts.collect::<Result<Vec<_>>>()?))
    }

    /// Returns the maximum number of tokens of an answer: one and a half times the longest answer of a lesson.
    fn max_answer_tokens(&self, tokenizer: &Tokenizer) -> Result<usize> {
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
            format: count(LessonKind::Medical, |text| parse_headings(text).is_some()),
            refusals: count(LessonKind::Other, |text| parse_refusal(text).is_some()),
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
        let questions = Questions::select(&lessons);
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
