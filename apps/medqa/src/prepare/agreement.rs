//! The details in which two questions must agree before they count as one: numbers, negations, opposites, drugs and the
//! words that carry the topic.

use super::units::{Units, is_han};
use regex::Regex;
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_64;

/// The least share of topic words that two questions have in common, and the number of topic words of both below which
/// all have to be the same: one word more makes a short question another one.
const TOPIC: f64 = 0.8;
const FEW_WORDS: usize = 9;

/// Beginnings of the words that say what is asked about a topic.
const ASPECTS: [&str; 14] = [
    "treat",
    "diagnos",
    "symptom",
    "sign",
    "caus",
    "prevent",
    "inherit",
    "risk",
    "prognos",
    "outlook",
    "research",
    "affect",
    "complicat",
    "genetic",
];
/// Words whose next one is a number or a letter that tells kinds apart.
const NUMBERED: [&str; 8] = ["type", "types", "stage", "grade", "class", "factor", "vitamin", "hepatitis"];

const NEGATIONS: [&str; 16] = [
    "not", "no", "never", "without", "neither", "nor", "none", "cannot", "stop", "avoid", "不", "没", "无", "未", "非",
    "勿",
];
/// Words that a question is not about if another one stands in their place.
const OPPOSITES: [&str; 74] = [
    "left",
    "right",
    "upper",
    "lower",
    "high",
    "low",
    "higher",
    "male",
    "female",
    "man",
    "woman",
    "men",
    "women",
    "boy",
    "girl",
    "adult",
    "adults",
    "child",
    "children",
    "childhood",
    "infant",
    "baby",
    "juvenile",
    "before",
    "after",
    "during",
    "acute",
    "chronic",
    "benign",
    "malignant",
    "positive",
    "negative",
    "increase",
    "decrease",
    "start",
    "primary",
    "secondary",
    "mild",
    "severe",
    "early",
    "late",
    "first",
    "second",
    "左",
    "右",
    "上",
    "下",
    "前",
    "后",
    "高",
    "低",
    "大",
    "小",
    "男",
    "女",
    "急",
    "慢",
    "良",
    "恶",
    "阴",
    "阳",
    "内",
    "外",
    "甲",
    "乙",
    "丙",
    "儿",
    "孕",
    "多",
    "少",
    "升",
    "降",
    "早",
    "晚",
];
/// Stems of names of drugs, as the WHO's INN has them, at the end of a word.
const DRUG_ENDINGS: [&str; 34] = [
    "mab",
    "pril",
    "sartan",
    "olol",
    "statin",
    "cillin",
    "mycin",
    "micin",
    "floxacin",
    "azole",
    "cycline",
    "dipine",
    "gliptin",
    "gliflozin",
    "glutide",
    "formin",
    "prazole",
    "tidine",
    "setron",
    "triptan",
    "caine",
    "barbital",
    "azepam",
    "zolam",
    "oxetine",
    "pramine",
    "tinib",
    "vir",
    "parin",
    "xaban",
    "gatran",
    "profen",
    "sone",
    "solone",
];
/// Words without a topic of their own.
const FUNCTION_WORDS: [&str; 91] = [
    "a",
    "an",
    "the",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "am",
    "do",
    "does",
    "did",
    "can",
    "could",
    "would",
    "should",
    "will",
    "may",
    "might",
    "must",
    "have",
    "has",
    "had",
    "of",
    "in",
    "on",
    "at",
    "to",
    "for",
    "from",
    "with",
    "by",
    "about",
    "as",
    "and",
    "or",
    "but",
    "if",
    "so",
    "that",
    "this",
    "these",
    "those",
    "it",
    "its",
    "i",
    "me",
    "my",
    "you",
    "your",
    "we",
    "our",
    "he",
    "she",
    "they",
    "their",
    "his",
    "her",
    "what",
    "which",
    "who",
    "when",
    "where",
    "why",
    "how",
    "please",
    "doctor",
    "dr",
    "hello",
    "hi",
    "thanks",
    "thank",
    "kindly",
    "tell",
    "know",
    "want",
    "explain",
    "ask",
    "wonder",
    "wondering",
    "need",
    "help",
    "there",
    "any",
    "some",
    "just",
    "also",
    "really",
    "very",
    "usually",
];
const FUNCTION_CHARACTERS: &str = "的了吗呢吧啊么是有会能可以要想请问我你您他她它们这那怎如何什哪为因所就都也还和与及或在到对把被给让得着过好谢医生大夫下一个些种点很";

/// Hashes of the details of a question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct QuestionDetails {
    /// The hash of all numbers with their units, negations, opposites and drugs.
    strict: u64,
    /// Hashes of the topic words, in order and without repeats.
    topic: Vec<u32>,
}

impl QuestionDetails {
    /// Collects the details of a question.
    pub(super) fn of(units: &Units) -> Self {
        let (mut strict, mut numbers, mut topic) = (Vec::<String>::new(), Vec::<String>::new(), Vec::new());
        let (mut number, mut numbered) = (false, false);
        let mut all = units.iter().peekable();
        while let Some(unit) = all.next() {
            if let Some(aspect) = ASPECTS.iter().find(|aspect| unit.starts_with(**aspect)) {
                strict.push((*aspect).to_owned());
            } else if numbered {
                strict.push(format!("kind {unit}"));
            }
            numbered = NUMBERED.contains(&unit);
            let begins_with_digit = unit.starts_with(|c: char| c.is_ascii_digit());
            let is_drug = DRUG_ENDINGS.iter().any(|ending| unit.len() > ending.len() + 2 && unit.ends_with(ending));
            let negated = NEGATIONS.contains(&unit) || unit.ends_with("n't");
            let is_sign = matches!(unit, "+" | "-" | "<" | ">" | "≤" | "≥");
            let counts = begins_with_digit || is_sign || is_number_word(unit, all.peek().copied());
            if counts {
                numbers.push(unit.to_owned());
            } else if number && let Some(last) = numbers.last_mut() {
                // What follows a number is its unit; "5 mg" is the same as "5mg".
                last.push_str(unit);
            } else if negated {
                strict.push("not".to_owned());
            } else if is_drug || OPPOSITES.contains(&unit) {
                strict.push(unit.to_owned());
            }
            let bare = unit.ends_with(|c: char| c.is_ascii_digit());
            number = bare || number && ["毫", "微", "纳", "千", "分"].contains(&unit);
            if !is_function_word(unit) && !begins_with_digit && !is_measure(unit) {
                topic.push(xxh3_64(stem(unit).as_bytes()) as u32);
            }
        }
        let text: String = units.iter().collect();
        strict.extend(CHINESE_ASPECTS.find_iter(&text).map(|aspect| aspect.as_str().to_owned()));
        strict.extend(CHINESE_DRUGS.find_iter(&text).map(|drug| drug.as_str().to_owned()));
        strict.sort_unstable();
        // The order of doses tells which drug has which.
        strict.append(&mut numbers);
        topic.sort_unstable();
        topic.dedup();
        Self { strict: xxh3_64(strict.join("\u{0}").as_bytes()), topic }
    }

    /// Returns whether two questions agree in all details.
    pub(super) fn agree(&self, other: &Self) -> bool {
        let few = self.topic.len().max(other.topic.len()) < FEW_WORDS;
        let same = if few { self.topic == other.topic } else { jaccard(&self.topic, &other.topic) >= TOPIC };
        self.strict == other.strict && same
    }
}

/// Chinese words that say what is asked about a topic.
static CHINESE_ASPECTS: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = "原因|病因|症状|治疗|诊断|预防|遗传|副作用|检查|饮食|费用|后遗症|并发症";
    // The pattern is a constant, which the tests compile.
    Regex::new(pattern).unwrap_or_else(|error| unreachable!("{error}"))
});

/// Chinese names of drugs by their usual endings, with the character before.
static CHINESE_DRUGS: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = "[\u{4e00}-\u{9fff}](?:西林|霉素|沙坦|普利|洛尔|地平|他汀|拉唑|替丁|沙星|环素|唑仑|西泮|替尼|列汀|列净|双胍|肝素|单抗|泼尼松)";
    // The pattern is a constant, which the tests compile.
    Regex::new(pattern).unwrap_or_else(|error| unreachable!("{error}"))
});

fn is_measure(unit: &str) -> bool {
    [
        "mg", "g", "kg", "ml", "l", "mcg", "ug", "µg", "iu", "mmol", "cm", "mm", "mmhg", "%", "percent", "克", "片",
        "粒", "岁",
    ]
    .contains(&unit)
}

/// Returns whether a word counts something: a number word, or a Chinese numeral before a measure.
fn is_number_word(unit: &str, next: Option<&str>) -> bool {
    const WORDS: [&str; 13] =
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "once", "twice", "half"];
    const NUMERALS: &str = "一二两三四五六七八九十半";
    const MEASURES: &str = "片粒次天日周月年岁克升支袋包滴丸毫微";
    let measured = || next.is_some_and(|next| next.chars().all(|c| MEASURES.contains(c)));
    WORDS.contains(&unit) || unit.chars().all(|c| NUMERALS.contains(c)) && measured()
}

fn is_function_word(unit: &str) -> bool {
    match unit.chars().next() {
        Some(c) if is_han(c) => FUNCTION_CHARACTERS.contains(c),
        _ => FUNCTION_WORDS.contains(&unit),
    }
}

/// Returns a word without the ending of a plural or a verb.
fn stem(word: &str) -> &str {
    if !word.is_ascii() || word.len() < 5 {
        return word;
    }
    ["ing", "ed", "s"].iter().find_map(|ending| word.strip_suffix(ending)).unwrap_or(word)
}

/// Returns the Jaccard similarity of two sorted sets; that of two empty sets is 1.
pub(super) fn jaccard<T: Ord>(one: &[T], other: &[T]) -> f64 {
    let (mut i, mut j, mut common) = (0, 0, 0);
    while let (Some(a), Some(b)) = (one.get(i), other.get(j)) {
        match a.cmp(b) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                (i, j, common) = (i + 1, j + 1, common + 1);
            }
        }
    }
    let union = one.len() + other.len() - common;
    if union == 0 { 1.0 } else { common as f64 / union as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_with_other_details_do_not_agree() {
        for (one, other, agree) in [
            ("Can I take 5 mg of it daily?", "Could I take 5mg of it daily, please?", true),
            ("Can I take 5 mg of it daily?", "Can I take 50 mg of it daily?", false),
            ("Can I drink milk with it?", "Can't I drink milk with it?", false),
            ("What are the treatments for asthma?", "What are the treatments for eczema?", false),
            ("What causes hypertension?", "What causes hypotension?", false),
            ("Is pain in the left arm dangerous?", "Is pain in the right arm dangerous?", false),
            ("Does lisinopril cause a dry cough at night?", "Does ramipril cause a dry cough at night?", false),
            ("糖尿病患者可以吃西瓜吗？", "请问糖尿病患者能吃西瓜吗", true),
            ("What causes Miller syndrome?", "What are the symptoms of Miller syndrome?", false),
            ("What are the treatments for Tietz syndrome?", "What are the treatments for Tietze syndrome?", false),
            (
                "How common is glycogen storage disease type I?",
                "How common is glycogen storage disease type III?",
                false,
            ),
            ("What is chronic myelogenous leukemia?", "What is atypical chronic myelogenous leukemia?", false),
            ("哮喘的病因有哪些", "哮喘的症状有哪些", false),
            ("糖尿病怎么治疗", "高血压怎么治疗", false),
            ("糖尿病患者可以吃西瓜吗", "糖尿病患者不可以吃西瓜吗", false),
            ("左肾结石怎么治疗比较快", "右肾结石怎么治疗比较快", false),
            ("长期吃缬沙坦对肾有影响吗", "长期吃氯沙坦对肾有影响吗", false),
        ] {
            let [a, b] = [one, other].map(|text| QuestionDetails::of(&Units::of(text)));
            assert_eq!(a.agree(&b), agree, "{one} / {other}: {:?} {:?}", a, b);
        }
    }

    #[test]
    fn doses_and_their_order_must_agree() {
        let details = |text: &str| QuestionDetails::of(&Units::of(text));
        let long = "Is it safe for an adult patient with high pressure and kidney trouble to take daily";
        for (a, b) in [
            ("50微克", "50毫克"),
            ("吃一片", "吃两片"),
            ("for 5 days", "for 5 weeks"),
            ("once", "twice"),
            ("with BP > 140", "with BP < 140"),
            ("5 mg of A and 50 mg of B", "50 mg of A and 5 mg of B"),
        ] {
            let of = |dose: &str| details(&format!("{long} this medicine {dose}"));
            assert!(!of(a).agree(&of(b)), "{a}, {b}");
            assert!(of(a).agree(&of(a)));
        }
    }
}
