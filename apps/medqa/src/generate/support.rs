//! Checks of an answer against its source, without a model: the numbers and the drugs that it names must stand there.

use super::request::is_han;

/// Stems of international nonproprietary names at the end of an English name (WHO, "The use of stems").
const STEMS_EN: [&str; 46] = [
    "cillin",
    "mycin",
    "micin",
    "floxacin",
    "cycline",
    "statin",
    "pril",
    "sartan",
    "olol",
    "dipine",
    "prazole",
    "conazole",
    "nidazole",
    "tidine",
    "setron",
    "triptan",
    "gliptin",
    "gliflozin",
    "glitazone",
    "glutide",
    "formin",
    "parin",
    "xaban",
    "gatran",
    "grel",
    "vir",
    "tinib",
    "ciclib",
    "mab",
    "zepam",
    "zolam",
    "barbital",
    "oxetine",
    "triptyline",
    "azepine",
    "peridone",
    "apine",
    "caine",
    "profen",
    "coxib",
    "olone",
    "asone",
    "thiazide",
    "semide",
    "terol",
    "dronate",
];
/// The same at the end of Chinese names.
const STEMS_ZH: [&str; 26] = [
    "西林", "霉素", "沙星", "环素", "他汀", "普利", "沙坦", "洛尔", "地平", "拉唑", "康唑", "硝唑", "替丁", "司琼",
    "列汀", "列净", "双胍", "肝素", "沙班", "替尼", "单抗", "西泮", "唑仑", "噻嗪", "膦酸", "他滨",
];

/// The names and numbers of an answer that its source does not have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Unsupported {
    pub numbers: Vec<String>,
    pub drugs: Vec<String>,
}

impl Unsupported {
    /// Compares an answer with its source.
    pub(super) fn find(answer: &str, source: &str) -> Self {
        let (known, lower) = (numbers(source), source.to_lowercase());
        let mut numbers = numbers(answer);
        numbers.retain(|number| !known.contains(number));
        let mut drugs = drug_names(answer);
        drugs.retain(|name| !lower.contains(name));
        Self { numbers, drugs }
    }

    /// Returns the reason to remove the row, if there is one.
    pub(super) fn reason(&self) -> Option<&'static str> {
        if !self.drugs.is_empty() {
            Some("a drug that the source does not name")
        } else if !self.numbers.is_empty() {
            Some("a number that the source does not have")
        } else {
            None
        }
    }
}

/// Returns the numbers of a text, without separators of thousands and without zeros at the end of a fraction. The
/// number of an item of a list is left out.
fn numbers(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line: Vec<char> = line.trim_start().chars().map(narrow).collect();
        let mut at = list_number(&line);
        while at < line.len() {
            if !line[at].is_ascii_digit() {
                at += 1;
                continue;
            }
            let start = at;
            let digit = |at: usize| line.get(at).is_some_and(char::is_ascii_digit);
            while digit(at) || matches!(line.get(at), Some('.' | ',')) && digit(at + 1) {
                at += 1;
            }
            let number: String = line[start..at].iter().filter(|c| **c != ',').collect();
            let number = match number.contains('.') {
                true => number.trim_end_matches('0').trim_end_matches('.'),
                false => &number,
            };
            found.push(number.to_owned());
        }
    }
    found
}

/// Returns the length of the number of a list item, such as `2. `, at the beginning of a line.
fn list_number(line: &[char]) -> usize {
    let digits = line.iter().take_while(|c| c.is_ascii_digit()).count();
    match line.get(digits) {
        Some('.' | ')' | '、')
            if (1..=2).contains(&digits) && !line.get(digits + 1).is_some_and(char::is_ascii_digit) =>
        {
            digits
        }
        _ => 0,
    }
}

/// Returns the ASCII form of a full-width digit or point.
fn narrow(c: char) -> char {
    match c {
        '０'..='９' => char::from(b'0' + (c as u32 - '０' as u32) as u8),
        '．' => '.',
        c => c,
    }
}

/// Returns the words of a text that end in the stem of a drug's name, in lower case; of a Chinese name, the stem and the
/// two characters before it.
fn drug_names(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() >= 6);
    let named = |word: &&str| STEMS_EN.iter().any(|stem| word.len() > stem.len() + 1 && word.ends_with(stem));
    let mut names: Vec<String> = words.filter(named).map(str::to_owned).collect();
    let characters: Vec<char> = lower.chars().collect();
    for stem in STEMS_ZH {
        let stem: Vec<char> = stem.chars().collect();
        for at in 0..characters.len() {
            if characters[at..].starts_with(&stem) {
                let before = characters[at.saturating_sub(2)..at].iter().rev().take_while(|c| is_han(**c)).count();
                names.push(characters[at - before..at + stem.len()].iter().collect());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(answer: &str, source: &str) -> Option<&'static str> {
        Unsupported::find(answer, source).reason()
    }

    #[test]
    fn numbers_and_drugs_must_stand_in_the_source() {
        let (number, drug) =
            (Some("a number that the source does not have"), Some("a drug that the source does not name"));
        let source = "Take 500 mg of Amoxicillin every 8 hours for 1,000 days; at most 2.50 g.";
        for (answer, expected) in [
            ("500 mg of amoxicillin, at most 2.5 g in 1000 days.", None),
            ("1. Take it.\n2. Every 8 hours.\n10) Stop.", None),
            ("250 mg of amoxicillin.", number),
            ("0.5 g", number),
            ("Ibuprofen every 8 hours.", drug),
            ("Stop the treatment in April.", None),
        ] {
            assert_eq!(reason(answer, source), expected, "{answer}");
        }
        let source = "每日口服阿莫西林５００毫克，并服用二甲双胍。";
        for (answer, expected) in [
            ("阿莫西林500毫克。", None),
            ("服用二甲双胍。", None),
            ("可用头孢霉素。", drug),
            ("可用氨苄西林。", drug),
            ("阿莫西林250毫克。", number),
        ] {
            assert_eq!(reason(answer, source), expected, "{answer}");
        }
    }
}
