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

/// Numbers of questions by kind.
#[derive(Clone, Copy)]
struct QuestionCounts {
    medical: usize,
    other: usize,
}

impl QuestionCounts {
    const fn total(self) -> usize {
        self.medical + self.other
    }
}

/// The questions whose answers are printed.
const SHOWN: QuestionCounts = QuestionCounts { medical: 2, other: 1 };
/// The further questions whose answers are only judged.
const JUDGED: QuestionCounts = QuestionCounts { medical: 8, other: 4 };

/// A number of right answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Score {
    /// Answers of the right form.
    pub right: usize,
    /// All judged answers.
    pub total: usize,
}

/// The questions that are asked.
pub(super) struct Questions<'a> {
    /// Lessons whose answers are printed, then lessons whose answers are judged.
    lessons: Vec<&'a Lesson>,
}

/// The answers of a model.
pub(super) struct Answers {
    /// The answers to the questions that are printed.
    pub shown: Vec<String>,
    /// The judged medical questions; an answer under the four headings is right.
    pub format: Score,
    /// The judged other questions; a refusal is right.
    pub refusals: Score,
}

impl<'a> Questions<'a> {
    /// Selects the questions among `lessons` that are not trained on.
    pub(super) fn select(lessons: &'a [Lesson]) -> Self {
        let unseen =
            |kind| lessons.iter().filter(move |lesson| (lesson.split, lesson.kind) == (LessonSplit::Unseen, kind));
        let part = |count: QuestionCounts, skip: QuestionCounts| {
            let other = unseen(LessonKind::Other).skip(skip.other).take(count.other);
            unseen(LessonKind::Medical).skip(skip.medical).take(count.medical).chain(other).collect::<Vec<_>>()
        };
        Self { lessons: [part(SHOWN, QuestionCounts { medical: 0, other: 0 }), part(JUDGED, SHOWN)].concat() }
    }

    /// Returns the questions whose answers are printed.
    pub(super) fn shown(&self) -> impl Iterator<Item = &str> {
        self.lessons.iter().take(SHOWN.total()).map(|lesson| lesson.question.as_str())
    }

    /// Asks a model all questions in one batch, with greedy decoding.
    pub(super) fn ask(&self, args: &ModelArgs, device: &Device) -> Result<Answers> {
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
        let judged = texts.split_off(SHOWN.total());
        let pairs = || self.lessons.iter().skip(SHOWN.total()).zip(&judged);
        let count = |kind, right: fn(&str) -> bool| {
            let texts: Vec<_> = pairs().filter(|(lesson, _)| lesson.kind == kind).map(|(_, text)| text).collect();
            Score { right: texts.iter().filter(|text| right(text)).count(), total: texts.len() }
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
        let all = |total| Score { right: total, total };
        assert_eq!((judged.format, judged.refusals), (all(8), all(4)));
        assert_eq!(judged.shown.len(), questions.shown().count());
        // A refusal is no answer to a medical question, nor four headings a refusal.
        let swapped: Vec<_> = right.into_iter().rev().collect();
        let judged = questions.judge(swapped);
        assert!(judged.format.right < 8 && judged.refusals.right < 4, "{:?} {:?}", judged.format, judged.refusals);
    }
}
