//! The lessons have the form that they teach, and no split knows another's subjects.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// A capital first, one full stop and that at the end.
fn is_sentence(text: &str) -> bool {
    let Some(inside) = text.strip_suffix('.') else { return false };
    let clean = !inside.contains(['.', '!', '?', ':', '\n']) && !inside.ends_with(' ') && !inside.is_empty();
    clean && text.starts_with(|first: char| first.is_ascii_uppercase())
}

/// No digit and no unit of a dose: the lessons prescribe nothing.
fn names_no_dose(text: &str) -> bool {
    let lower = text.to_lowercase();
    let units = ["mg", "ml", "milligram", "microgram", "milliliter"];
    !text.contains(|c: char| c.is_ascii_digit())
        && !lower.split(|c: char| !c.is_alphanumeric()).any(|word| units.contains(&word))
}

/// The sentences of an answer of the right form.
fn sentences(lesson: &Lesson) -> Option<Vec<&str>> {
    match lesson.kind {
        Kind::Medical => headed(&lesson.answer).map(|bodies| bodies.to_vec()),
        Kind::Other => refused(&lesson.answer).map(|reason| vec![reason]),
    }
}

#[test]
fn every_lesson_has_the_form_it_teaches() {
    for lesson in all().unwrap() {
        let found = sentences(&lesson).unwrap_or_else(|| panic!("wrong form: {lesson:?}"));
        let longest = if lesson.kind == Kind::Medical { 14 } else { 20 };
        for sentence in found {
            assert!(is_sentence(sentence), "no single sentence: {sentence}");
            assert!((6..=longest).contains(&words(sentence)), "{} words: {sentence}", words(sentence));
            assert!(names_no_dose(sentence), "a digit or a dose: {sentence}");
        }
        let texts = [&lesson.topic, &lesson.question, &lesson.answer];
        assert!(texts.iter().all(|text| text.is_ascii() && text.trim() == *text && !text.is_empty()), "{lesson:?}");
        assert!(texts.iter().all(|text| !text.contains("  ")), "a double space: {lesson:?}");
        assert!(lesson.question.ends_with(['?', '.']) && (3..=40).contains(&words(&lesson.question)), "{lesson:?}");
        if lesson.kind == Kind::Medical {
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
    // (lessons, topics) at least; of those that are measured, exactly.
    for (key, least, exact) in [
        ((Split::Train, Kind::Medical), (170, 85), false),
        ((Split::Train, Kind::Other), (60, 60), false),
        ((Split::Valid, Kind::Medical), (16, 8), true),
        ((Split::Valid, Kind::Other), (6, 6), true),
        ((Split::Unseen, Kind::Medical), (10, 10), true),
        ((Split::Unseen, Kind::Other), (6, 6), true),
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
    for kind in [Kind::Medical, Kind::Other] {
        let [train, valid, unseen] = [Split::Train, Split::Valid, Split::Unseen].map(|split| topics(split, kind));
        assert!(train.is_disjoint(&valid) && train.is_disjoint(&unseen) && valid.is_disjoint(&unseen), "{kind:?}");
    }
    let trained = all.iter().filter(|lesson| (lesson.split, lesson.kind) == (Split::Train, Kind::Medical));
    let trained: Vec<_> =
        trained.map(|lesson| format!("{} {}", lesson.question, lesson.answer).to_lowercase()).collect();
    for topic in &topics(Split::Valid, Kind::Medical) | &topics(Split::Unseen, Kind::Medical) {
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
    assert_eq!(headed(good), Some(["A cold.", "None.", "Rest.", "Soon."]));
    assert!(headed(&format!("{good}\n")).is_some());
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
        assert_eq!(headed(bad), None, "{bad}");
    }
    assert_eq!(refused(&format!("{REFUSAL} Ask a cook.")), Some("Ask a cook."));
    assert_eq!(refused("I am sorry."), None);
}
