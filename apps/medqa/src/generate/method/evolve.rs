//! Evol-Instruct: an instruction is rewritten round by round, in depth or in breadth. A rewrite that asks the same, or
//! that cannot be answered, is dropped, and the next round starts from the instruction before it.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, ItemResult, RejectedText, RequestOrigin, Step},
        filters::{FilterRules, words},
        input::SourceRow,
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method,
    template::fill,
};
use burn_peft::random;
use serde_json::json;

/// Rewrites of an instruction, unless the recipe says otherwise.
const ROUNDS: u32 = 2;

/// The ways to rewrite an instruction.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rewrite {
    Constrain,
    Deepen,
    Concretize,
    Reason,
    Broaden,
}

impl Rewrite {
    const ALL: [Self; 5] = [Self::Constrain, Self::Deepen, Self::Concretize, Self::Reason, Self::Broaden];

    fn name(self) -> &'static str {
        match self {
            Self::Constrain => "constrain",
            Self::Deepen => "deepen",
            Self::Concretize => "concretize",
            Self::Reason => "reason",
            Self::Broaden => "broaden",
        }
    }

    /// Returns the rule of the rewrite, for the prompt.
    fn rule(self, language: Language) -> &'static str {
        match (language, self) {
            (Language::En, Self::Constrain) => {
                "Add one requirement or condition to it, such as an age, another illness or a limit."
            }
            (Language::En, Self::Deepen) => "Ask for more depth and breadth on the matter that it is about.",
            (Language::En, Self::Concretize) => {
                "Replace a general term in it by a more specific one, or its subject by a concrete case."
            }
            (Language::En, Self::Reason) => "Change it so that the answer takes several steps of reasoning.",
            (Language::En, Self::Broaden) => {
                "Write a new instruction of the same field instead, about something rarer, of similar length and difficulty."
            }
            (Language::Zh, Self::Constrain) => "增加一个要求或条件，例如年龄、合并症或限制。",
            (Language::Zh, Self::Deepen) => "就它所涉及的内容，要求更深入、更全面的回答。",
            (Language::Zh, Self::Concretize) => "把其中笼统的说法换成更具体的说法，或换成一个具体的病例。",
            (Language::Zh, Self::Reason) => "改得需要多步推理才能回答。",
            (Language::Zh, Self::Broaden) => "改为写一条同一领域的新指令，内容更少见，长度和难度相近。",
        }
    }
}

/// The method `evolve`.
pub(in super::super) struct Evolve {
    pub seed: u64,
    pub language: Language,
    pub instructions: Vec<SourceRow>,
    pub rounds: Option<u32>,
}

impl Evolve {
    fn draw(&self, item: u64, round: u32) -> Rewrite {
        let key = random::key(&[self.seed, random::key_from_str("evolve"), item]);
        Rewrite::ALL[(random::bits(key, round.into()) % Rewrite::ALL.len() as u64) as usize]
    }

    fn rewrite(&self, kind: Rewrite, instruction: &str) -> Prompt {
        let template = match self.language {
            Language::En => include_str!("../prompts/evolve.en.txt"),
            Language::Zh => include_str!("../prompts/evolve.zh.txt"),
        };
        let values = [("rule", kind.rule(self.language)), ("instruction", instruction)];
        Prompt::user(fill(template.trim_end(), &values), 512)
    }

    fn compare(&self, old: &str, new: &str) -> Prompt {
        let template = match self.language {
            Language::En => include_str!("../prompts/evolve-compare.en.txt"),
            Language::Zh => include_str!("../prompts/evolve-compare.zh.txt"),
        };
        Prompt { temperature: 0.0, ..Prompt::user(fill(template.trim_end(), &[("old", old), ("new", new)]), 16) }
    }
}

/// Returns the reason why a rewrite cannot be used.
fn rewrite_flaw(new: &str, truncated: bool) -> Option<&'static str> {
    let lower = new.to_lowercase();
    let leaked = [
        "given instruction",
        "rewritten instruction",
        "new instruction",
        "the instruction:",
        "改写后的指令",
        "原指令",
        "新指令",
    ];
    if truncated {
        Some("rewrite cut off")
    } else if leaked.iter().any(|words| lower.contains(words)) {
        Some("rewrite with words of the prompt")
    } else {
        None
    }
}

/// Returns the reason why an answer shows that the instruction cannot be followed.
fn answer_flaw(answer: &str) -> Option<&'static str> {
    let lower = answer.to_lowercase();
    let short = words(answer).len() < 80;
    let sorry = ["sorry", "抱歉", "对不起"].iter().any(|word| lower.contains(word));
    (short && sorry).then_some("answer that excuses itself")
}

/// Returns whether a verdict says that two instructions ask the same.
fn is_equal(verdict: &str) -> bool {
    let lower = verdict.trim().to_lowercase();
    let different = ["not equal", "unequal", "different", "不同", "不相同"].iter().any(|word| lower.contains(word));
    !different && ["equal", "same", "相同"].iter().any(|word| lower.contains(word))
}

impl Method for Evolve {
    fn num_items(&self) -> Option<u64> {
        Some(self.instructions.len() as u64)
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(row) = usize::try_from(item).ok().and_then(|item| self.instructions.get(item)) else {
            return Step::Done(Default::default());
        };
        let (mut rest, mut result) = (answers.iter(), ItemResult::default());
        let mut current = row.question.trim().to_owned();
        for round in 0..self.rounds.unwrap_or(ROUNDS) {
            let kind = self.draw(item, round);
            let Some(rewrite) = rest.next() else { return Step::Ask(self.rewrite(kind, &current)) };
            let new = rewrite.text.trim();
            let mut reject = |reason: &str| {
                result.rejected.push(RejectedText { reason: reason.to_owned(), text: new.to_owned() });
            };
            if let Some(reason) = rewrite_flaw(new, rewrite.truncated) {
                reject(reason);
                continue;
            }
            let Some(verdict) = rest.next() else { return Step::Ask(self.compare(&current, new)) };
            if is_equal(&verdict.text) {
                reject("rewrite that asks the same");
                continue;
            }
            let Some(answer) = rest.next() else {
                return Step::Ask(Prompt { temperature: 0.7, ..Prompt::user(new.to_owned(), 2048) });
            };
            let flaw = if answer.truncated { Some("answer cut off at its limit") } else { answer_flaw(&answer.text) };
            if let Some(reason) = flaw {
                reject(reason);
                continue;
            }
            let draft = Draft::qa(new, &answer.text, RequestOrigin::from(answer))
                .with_origin("seed_ids", json!([row.place]))
                .with_origin("round", round + 1)
                .with_origin("rewrite", kind.name());
            result.drafts.push(draft);
            current = new.to_owned();
        }
        Step::Done(result)
    }

    fn rules(&self) -> FilterRules {
        let known = self.instructions.iter().map(|row| row.question.clone()).collect();
        FilterRules { language: self.language, known, min_answer: 2, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        let rounds = f64::from(self.rounds.unwrap_or(ROUNDS));
        ExpectedSize { requests: 3.0 * rounds, rows: 0.8 * rounds, answer_tokens: 200.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    fn method(language: Language) -> Evolve {
        let row =
            SourceRow { place: "line 1".to_owned(), question: "Explain asthma.".to_owned(), answer: String::new() };
        Evolve { seed: 42, language, instructions: vec![row], rounds: None }
    }

    fn answers(texts: &[&str]) -> Vec<ModelAnswer> {
        let answer =
            |text: &&str| ModelAnswer { text: (*text).to_owned(), truncated: false, created: None, key: String::new() };
        texts.iter().map(answer).collect()
    }

    #[test]
    fn prompts_are_the_golden_ones() {
        for language in [Language::En, Language::Zh] {
            let (method, name) = (method(language), language.name());
            let rewrites = Rewrite::ALL.map(|kind| golden::text(&method.rewrite(kind, "Explain asthma.")).to_owned());
            golden::check(&format!("evolve.{name}.txt"), &rewrites.join("\n=====\n"));
            let compare = golden::prompt(method.step(0, &answers(&["Explain asthma in children."])));
            golden::check(&format!("evolve-compare.{name}.txt"), golden::text(&compare));
        }
    }

    #[test]
    fn a_dropped_rewrite_leaves_the_instruction_before_it() {
        let method = method(Language::En);
        let Step::Done(result) =
            method.step(0, &answers(&["A in children.", "Not equal", "It is so.", "B in adults.", "Equal"]))
        else {
            panic!("the item is finished")
        };
        assert_eq!(result.drafts.len(), 1);
        assert_eq!(
            (result.drafts[0].question.as_str(), &result.drafts[0].origin["round"]),
            ("A in children.", &json!(1))
        );
        assert_eq!(result.rejected[0].reason, "rewrite that asks the same");
        // The second round starts from the first rewrite, or from the instruction if that was dropped.
        let next = |texts: &[&str]| golden::text(&golden::prompt(method.step(0, &answers(texts)))).to_owned();
        assert!(next(&["A in children.", "Not equal", "It is so."]).contains("A in children."));
        assert!(next(&["A in children.", "Not equal", "I am sorry."]).contains("Explain asthma."));
        assert!(next(&["The given instruction: x"]).contains("Explain asthma."));
    }
}
