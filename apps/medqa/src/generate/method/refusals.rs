//! Rows about safety: requests to refuse, and requests that look alike and are to be answered; emergencies, and
//! complaints that are none. Each kind comes with its opposite, so that a model learns to tell them apart.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, Step},
        filters::FilterRules,
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method, qa_items,
    template::fill,
};
use burn_peft::random;

/// Rows of one request.
const ROWS: u64 = 4;

/// The kinds of rows. The first two and the last two are opposites.
#[derive(Debug, Clone, Copy, PartialEq)]
enum SafetyKind {
    Refuse,
    Answer,
    Emergency,
    Everyday,
}

const RISKS_EN: [&str; 8] = [
    "overdoses of common medicines",
    "prescriptions and sick notes",
    "giving medicine to somebody who does not know it",
    "stopping a treatment such as insulin",
    "operations at home",
    "alcohol together with medicines",
    "medicines of other people",
    "driving after sedatives",
];
const RISKS_ZH: [&str; 8] = [
    "常用药过量",
    "处方和病假证明",
    "让他人在不知情时服药",
    "自行停用胰岛素等治疗",
    "在家自己做手术",
    "饮酒同时服药",
    "使用他人的药物",
    "服用镇静药后开车",
];
const COMPLAINTS_EN: [&str; 8] = [
    "chest",
    "breathing",
    "weakness of an arm or the face",
    "allergic reactions",
    "bleeding",
    "small children and swallowed things",
    "seizures and fainting",
    "head injuries and headaches",
];
const COMPLAINTS_ZH: [&str; 8] =
    ["胸部不适", "呼吸问题", "手臂或面部无力", "过敏反应", "出血", "儿童误吞异物", "抽搐和晕厥", "头部外伤和头痛"];

impl SafetyKind {
    const ALL: [Self; 4] = [Self::Refuse, Self::Answer, Self::Emergency, Self::Everyday];

    fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Answer => "answer",
            Self::Emergency => "emergency",
            Self::Everyday => "everyday",
        }
    }

    fn topics(self, language: Language) -> &'static [&'static str] {
        match (self, language) {
            (Self::Refuse | Self::Answer, Language::En) => &RISKS_EN,
            (Self::Refuse | Self::Answer, Language::Zh) => &RISKS_ZH,
            (Self::Emergency | Self::Everyday, Language::En) => &COMPLAINTS_EN,
            (Self::Emergency | Self::Everyday, Language::Zh) => &COMPLAINTS_ZH,
        }
    }

    /// Returns the rule for the rows of the kind, for the prompt.
    fn rule(self, language: Language) -> &'static str {
        match (language, self) {
            (Language::En, Self::Refuse) => {
                "The questions are requests that a medical assistant must refuse, because somebody would come to harm or be \
                 deceived; they describe no method. Each answer begins with \"I cannot help with that\", gives the reason in \
                 one sentence, and then names a safe way or a person to turn to. It never explains how the harm is done."
            }
            (Language::En, Self::Answer) => {
                "The questions sound dangerous, but are asked for safety, care or study, and are to be answered. Each answer \
                 helps at once, with correct facts and sensible warnings, and does not refuse or moralise."
            }
            (Language::En, Self::Emergency) => {
                "The questions describe an emergency, in plain words and without that word. The first sentence of each answer \
                 tells the person to call the emergency services now; then come the first steps until help arrives."
            }
            (Language::En, Self::Everyday) => {
                "The questions describe harmless complaints of everyday life. Each answer calms, tells what helps at home, and \
                 only at its end names the signs with which to see a doctor."
            }
            (Language::Zh, Self::Refuse) => {
                "问题是医学助手必须拒绝的请求，因为会伤害或欺骗他人；问题中不描述任何方法。每个回答以“我不能帮助你做这件事”开头，用一句话说明\
                 理由，再给出安全的做法或可以求助的人。绝不解释如何造成伤害。"
            }
            (Language::Zh, Self::Answer) => {
                "问题听起来危险，但实际是出于安全、照护或学习的目的，应当回答。每个回答直接提供帮助，内容正确，并给出必要的提醒，不拒绝，不说教。"
            }
            (Language::Zh, Self::Emergency) => {
                "问题用平常的话描述一种急症，但不出现“急症”一词。每个回答的第一句就要求立即拨打120，然后说明救援到来前的处理步骤。"
            }
            (Language::Zh, Self::Everyday) => {
                "问题描述日常生活中无害的小毛病。每个回答先让人安心，再说明在家如何处理，最后才提到出现哪些情况应当就医。"
            }
        }
    }

    /// Returns the reason why an answer is none of its kind.
    fn flaw(self, answer: &str) -> Option<&'static str> {
        let start: String = answer.to_lowercase().chars().take(120).collect();
        let first = start.split(['.', '!', '。', '！', '\n']).next().unwrap_or_default();
        let contains = |text: &str, words: &[&str]| words.iter().any(|word| text.contains(word));
        let refuses = contains(
            &start,
            &["cannot", "can't", "can’t", "won't", "unable to", "not able to", "不能", "无法", "不会帮"],
        );
        let alarms = contains(first, &["emergency", "ambulance", "911", "112", "999", "120", "急救"]);
        match self {
            Self::Refuse if !refuses => Some("refusal that does not refuse"),
            Self::Answer if refuses && contains(first, &["cannot", "can't", "can’t", "不能", "无法"]) => {
                Some("refusal of a harmless question")
            }
            Self::Emergency if !alarms => Some("emergency without a call for help"),
            Self::Everyday if alarms => Some("alarm about a harmless complaint"),
            _ => None,
        }
    }
}

/// The method `refusals`.
pub(in super::super) struct Refusals {
    pub seed: u64,
    pub language: Language,
}

impl Refusals {
    /// Returns the kind and the topic of an item. Opposites that follow each other share their topic.
    fn kind(item: u64) -> SafetyKind {
        SafetyKind::ALL[(item % 4) as usize]
    }

    fn topic(&self, item: u64) -> &'static str {
        let topics = Self::kind(item).topics(self.language);
        let key = random::key(&[self.seed, random::key_from_str("refusals")]);
        topics[(random::bits(key, item / 2) % topics.len() as u64) as usize]
    }
}

impl Method for Refusals {
    fn num_items(&self) -> Option<u64> {
        None
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let kind = Self::kind(item);
        let Some(answer) = answers.first() else {
            let template = match self.language {
                Language::En => include_str!("../prompts/refusals.en.txt"),
                Language::Zh => include_str!("../prompts/refusals.zh.txt"),
            };
            let (count, rule) = (ROWS.to_string(), kind.rule(self.language));
            let text = fill(template.trim_end(), &[("count", &count), ("topic", self.topic(item)), ("rule", rule)]);
            return Step::Ask(Prompt::user(text, 1536).with_schema(qa_items::schema()));
        };
        match qa_items::read(answer) {
            Err(reason) => Step::Unusable(reason),
            Ok(mut result) => {
                let checked = |draft: Draft| {
                    let flaw = kind.flaw(&draft.answer);
                    Draft { flaw, ..draft.with_origin("kind", kind.name()).with_origin("topic", self.topic(item)) }
                };
                result.drafts = result.drafts.into_iter().map(checked).collect();
                Step::Done(result)
            }
        }
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, max_rouge: Some(0.7), min_answer: 5, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 1.0, rows: 3.0, answer_tokens: 400.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    #[test]
    fn prompts_are_the_golden_ones_and_opposites_share_a_topic() {
        for language in [Language::En, Language::Zh] {
            let method = Refusals { seed: 42, language };
            let prompts: Vec<_> =
                (0..4).map(|item| golden::text(&golden::prompt(method.step(item, &[]))).to_owned()).collect();
            golden::check(&format!("refusals.{}.txt", language.name()), &prompts.join("\n=====\n"));
            assert!((0..40).step_by(2).all(|item| method.topic(item) == method.topic(item + 1)));
        }
    }

    #[test]
    fn answers_must_be_of_their_kind() {
        let (refuse, answer) = (SafetyKind::Refuse, SafetyKind::Answer);
        let (emergency, everyday) = (SafetyKind::Emergency, SafetyKind::Everyday);
        for (kind, text, expected) in [
            (refuse, "I cannot help with that. It would harm him.", None),
            (refuse, "Take twice the dose.", Some("refusal that does not refuse")),
            (answer, "Keep to 4 g a day. You cannot take more.", None),
            (answer, "I can't help with that.", Some("refusal of a harmless question")),
            (emergency, "Call an ambulance now. Sit upright.", None),
            (emergency, "Sit upright. If it stays, call 911.", Some("emergency without a call for help")),
            (everyday, "This is harmless. Rest. Call an ambulance if you faint.", None),
            (everyday, "Call an ambulance now.", Some("alarm about a harmless complaint")),
            (refuse, "我不能帮助你做这件事。", None),
            (emergency, "请立即拨打120。", None),
            (answer, "我无法回答。", Some("refusal of a harmless question")),
        ] {
            assert_eq!(kind.flaw(text), expected, "{text}");
        }
    }
}
