//! Checks that the lessons have the form that they teach, and that no subject is in two splits.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// Returns whether a text starts with a capital letter and has one full stop, at its end.
fn is_sentence(text: &str) -> bool {
    let Some(inside) = text.strip_suffix('.') else { return false };
    let clean = !inside.contains(['.', '!', '?', ':', '\n']) && !inside.ends_with(' ') && !inside.is_empty();
    clean && text.starts_with(|first: char| first.is_ascii_uppercase())
}

/// Returns whether a text has no digit and no unit of a dose: the lessons prescribe nothing.
fn names_no_dose(text: &str) -> bool {
    let lower = text.to_lowercase();
    let units = ["mg", "ml", "milligram", "microgram", "milliliter"];
    !text.contains(|c: char| c.is_ascii_digit())
        && !lower.split(|c: char| !c.is_alphanumeric()).any(|word| units.contains(&word))
}

/// Returns the sentences of an answer of the right form.
fn sentences(lesson: &Lesson) -> Option<Vec<&str>> {
    match lesson.kind {
        LessonKind::Medical => parse_headings(&lesson.answer).map(|bodies| bodies.to_vec()),
        LessonKind::Other => parse_refusal(&lesson.answer).map(|reason| vec![reason]),
    }
}

#[test]
fn every_lesson_has_the_form_it_teaches() {
    for lesson in all().unwrap() {
        let found = sentences(&lesson).unwrap_or_else(|| panic!("wrong form: {lesson:?}"));
        let longest = if lesson.kind == LessonKind::Medical { 14 } else { 20 };
        for sentence in found {
            assert!(is_sentence(sentence), "no single sentence: {sentence}");
            assert!((6..=longest).contains(&words(sentence)), "{} words: {sentence}", words(sentence));
            assert!(names_no_dose(sentence), "a digit or a dose: {sentence}");
        }
        let texts = [&lesson.topic, &lesson.question, &lesson.answer];
        assert!(texts.iter().all(|text| text.is_ascii() && text.trim() == *text && !text.is_empty()), "{lesson:?}");
        assert!(texts.iter().all(|text| !text.contains("  ")), "a double space: {lesson:?}");
        assert!(lesson.question.ends_with(['?', '.']) && (3..=40).contains(&words(&lesson.question)), "{lesson:?}");
        if lesson.kind == LessonKind::Medical {
            assert!((45..=75).contains(&words(&lesson.answer)), "{} words: {lesson:?}", words(&lesson.answer));
        }
    }
}

#[test]
fn every_split_is_large_enough() {
    let (mut lessons, mut topics) = (BTreeMap::new(), BTreeMap::<_, BTreeSet<_>>::new());
    let all = all().unwrap();
    for lesson in &all {
        let key = (lesson.split, lesson.kind);
        *lessons.entry(key).or_insert(0) += 1;
        topics.entry(key).or_default().insert(&lesson.topic);
    }
    // The minimum numbers of (lessons, topics); exact for the splits that are measured.
    for (key, least, exact) in [
        ((LessonSplit::Train, LessonKind::Medical), (170, 85), false),
        ((LessonSplit::Train, LessonKind::Other), (60, 60), false),
        ((LessonSplit::Valid, LessonKind::Medical), (16, 8), true),
        ((LessonSplit::Valid, LessonKind::Other), (6, 6), true),
        ((LessonSplit::Unseen, LessonKind::Medical), (10, 10), true),
        ((LessonSplit::Unseen, LessonKind::Other), (6, 6), true),
    ] {
        let found = (lessons[&key], topics[&key].len());
        assert!(found == least || (!exact && found.0 >= least.0 && found.1 >= least.1), "{key:?}: {found:?}");
    }
}

#[test]
fn no_split_knows_another_s_subjects() {
    let all = all().unwrap();
    let topics = |split, kind| -> BTreeSet<&str> {
        let chosen = all.iter().filter(|lesson| lesson.split == split && lesson.kind == kind);
        chosen.map(|lesson| lesson.topic.as_str()).collect()
    };
    for kind in [LessonKind::Medical, LessonKind::Other] {
        let [train, valid, unseen] =
            [LessonSplit::Train, LessonSplit::Valid, LessonSplit::Unseen].map(|split| topics(split, kind));
        assert!(train.is_disjoint(&valid) && train.is_disjoint(&unseen) && valid.is_disjoint(&unseen), "{kind:?}");
    }
    let trained = all.iter().filter(|lesson| (lesson.split, lesson.kind) == (LessonSplit::Train, LessonKind::Medical));
    let trained: Vec<_> =
        trained.map(|lesson| format!("{} {}", lesson.question, lesson.answer).to_lowercase()).collect();
    for topic in &topics(LessonSplit::Valid, LessonKind::Medical) | &topics(LessonSplit::Unseen, LessonKind::Medical) {
        assert!(!trained.iter().any(|text| text.contains(topic)), "a trained lesson names `{topic}`");
    }
}

#[test]
fn nothing_is_there_twice() {
    let all = all().unwrap();
    let mut seen = BTreeSet::new();
    for lesson in &all {
        let texts = [lesson.question.as_str(), lesson.answer.as_str()];
        for text in texts.into_iter().chain(sentences(lesson).unwrap_or_default()) {
            assert!(seen.insert(text.to_lowercase()), "twice: {text}");
        }
    }
}

#[test]
fn a_form_is_kept_whole_or_not_at_all() {
    let good = "Likely cause: A cold.\nWarning signs: None.\nWhat to do: Rest.\nWhen to see a doctor: Soon.";
    assert_eq!(parse_headings(good), Some(["A cold.", "None.", "Rest.", "Soon."]));
    assert!(parse_headings(&format!("{good}\n")).is_some());
    for bad in [
        "",
        "A cold.",
        &good.replace("Warning signs", "Warnings"),
        &good.replace("A cold.", ""),
        &good[..good.len() - 1],
        &format!("Hello.\n{good}"),
        &format!("{good}\nBye."),
        &good.lines().rev().collect::<Vec<_>>().join("\n"),
    ] {
        assert_eq!(parse_headings(bad), None, "{bad}");
    }
    assert_eq!(parse_refusal(&format!("{REFUSAL} Ask a cook.")), Some("Ask a cook."));
    assert_eq!(parse_refusal("I am sorry."), None);
}
