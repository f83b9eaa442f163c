//! Personal data in texts: phone numbers, identity and bank cards, addresses on the net, record numbers, dates of birth
//! and names that follow a word which announces them.

use clap::ValueEnum;
use regex::Regex;
use std::{collections::BTreeMap, sync::LazyLock};

/// Treatment of personal data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnPersonal {
    /// Replace it by a word such as <PHONE>
    Mask,
    /// Leave the row out
    Drop,
    /// Keep the row, and count
    Report,
}

/// A kind of personal data.
struct PersonalKind {
    /// Name in the counts; in upper case, the mask.
    name: &'static str,
    pattern: Regex,
    /// Decides about a match whose form alone does not tell.
    is_valid: fn(&str) -> bool,
}

/// Name, pattern and check of a kind.
type KindRow = (&'static str, &'static str, fn(&str) -> bool);

static KINDS: LazyLock<Vec<PersonalKind>> = LazyLock::new(|| {
    let rows: [KindRow; 12] = [
        ("email", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}", always),
        ("url", r"(?:https?://|www\.)[!-~&&[^<>)\x22]]+", always),
        ("identity_card", r"(?-u:\b)[1-9][0-9]{16}[0-9Xx](?-u:\b)", is_identity_card),
        ("identity_card", r"(?-u:\b)[1-9][0-9]{14}(?-u:\b)", is_old_identity_card),
        ("bank_card", r"(?-u:\b)[0-9]{4}(?:[ -]?[0-9]{4}){2,3}(?:[ -]?[0-9]{1,3})?(?-u:\b)", is_bank_card),
        ("mobile", r"(?:\+86[ -]?|(?-u:\b)(?:86[ -]?)?)1[3-9][0-9][ -]?[0-9]{4}[ -]?[0-9]{4}(?-u:\b)", always),
        ("ssn", r"(?-u:\b)[0-9]{3}-[0-9]{2}-[0-9]{4}(?-u:\b)", is_ssn),
        (
            "phone",
            r"\([0-9]{3}\) ?[0-9]{3}-[0-9]{4}(?-u:\b)|(?-u:\b)[0-9]{3}[-.][0-9]{3}[-.][0-9]{4}(?-u:\b)|(?-u:\b)0[0-9]{2,3}-[0-9]{7,8}(?-u:\b)|\+[0-9]{1,3}[ -][0-9]{1,4}(?:[ -][0-9]{2,4}){2,4}(?-u:\b)",
            always,
        ),
        ("ip_address", r"(?-u:\b)(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?-u:\b)", is_ip_address),
        (
            "record_number",
            r"(?:住院号|病历号|门诊号|就诊卡号|MRN|[Mm]edical record (?:no\.?|number))[:：#\s]*([A-Za-z]?[0-9]{4,12})(?-u:\b)",
            always,
        ),
        (
            "date_of_birth",
            r"(?:出生日期|生日|DOB|[Dd]ate of birth)[:：\s]*([0-9]{1,4}[-/.年][0-9]{1,2}[-/.月][0-9]{1,4}日?)",
            always,
        ),
        (
            "name",
            r"(?:姓名[:：]\s*([\x{4e00}-\x{9fff}]{2,4})|[Pp]atient(?:'s)? [Nn]ame[:：]\s*([A-Z][a-z]+(?: [A-Z][a-z]+)+)|(?-u:\b)(?:Mr|Mrs|Ms|Dr)\.? ([A-Z][a-z]+(?: [A-Z][a-z]+)?))",
            is_name,
        ),
    ];
    let kind = |(name, text, is_valid): KindRow| PersonalKind {
        name,
        // The patterns are constants, which the tests compile.
        pattern: Regex::new(text).unwrap_or_else(|error| unreachable!("{name}: {error}")),
        is_valid,
    };
    rows.map(kind).into()
});

fn always(_: &str) -> bool {
    true
}

/// Refuses the word that begins a sentence after "Dr." in a letter.
fn is_name(text: &str) -> bool {
    const NO_NAMES: [&str; 22] = [
        "A", "After", "Are", "Can", "Could", "Do", "Does", "For", "How", "I", "If", "In", "Is", "It", "My", "Please",
        "Should", "The", "What", "When", "Why", "Will",
    ];
    let first = text.split(' ').next().unwrap_or_default();
    !NO_NAMES.contains(&first)
}

fn digits(text: &str) -> Vec<u32> {
    text.chars().filter_map(|c| c.to_digit(10)).collect()
}

/// Checks a date of the form YYYYMMDD or YYMMDD.
fn is_date(text: &str) -> bool {
    let [year, rest] = [&text[..text.len() - 4], &text[text.len() - 4..]];
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    let (month, day) = (number(&rest[..2]), number(&rest[2..]));
    let year_fits = year.len() == 2 || (1900..=2100).contains(&number(year));
    year_fits && (1..=12).contains(&month) && (1..=31).contains(&day)
}

fn is_identity_card(text: &str) -> bool {
    const WEIGHTS: [u32; 17] = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2];
    let sum: u32 = digits(&text[..17]).iter().zip(WEIGHTS).map(|(digit, weight)| digit * weight).sum();
    let check = "10X98765432".chars().nth(sum as usize % 11);
    check == text.to_ascii_uppercase().chars().last() && is_date(&text[6..14])
}

fn is_old_identity_card(text: &str) -> bool {
    is_date(&text[6..12])
}

/// Checks the sum of Luhn, and that the number begins like a card's.
fn is_bank_card(text: &str) -> bool {
    let number = digits(text);
    let doubled = |(index, digit): (usize, &u32)| match index % 2 {
        0 => *digit,
        _ => digit * 2 / 10 + digit * 2 % 10,
    };
    let sum: u32 = number.iter().rev().enumerate().map(doubled).sum();
    (13..=19).contains(&number.len()) && sum.is_multiple_of(10) && matches!(number[0], 3..=6)
}

fn is_ssn(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    !matches!(parts[0], "000" | "666") && !parts[0].starts_with('9') && parts[1] != "00" && parts[2] != "0000"
}

fn is_ip_address(text: &str) -> bool {
    let parts: Vec<u32> = text.split('.').filter_map(|part| part.parse().ok()).collect();
    // Short numbers are sections or versions.
    parts.iter().all(|&part| part < 256) && parts.iter().any(|&part| part > 99)
}

/// Masks personal data, and counts it by kind. Returns none if there is none.
pub(super) fn masked(text: &str, counts: &mut BTreeMap<&'static str, u64>) -> Option<String> {
    if !text.bytes().any(|byte| byte.is_ascii_digit() || matches!(byte, b'@' | b':' | b'.'))
        && !text.contains('：')
        && !text.contains("Dr")
        && !text.contains("Mr")
        && !text.contains("www")
    {
        return None;
    }
    let mut masked: Option<String> = None;
    for kind in KINDS.iter() {
        let current = masked.as_deref().unwrap_or(text);
        let (mut replaced, mut end) = (String::new(), 0);
        for found in kind.pattern.captures_iter(current) {
            // The mask stands for the group, if the pattern has one; the word before it stays.
            let Some(place) = found.iter().skip(1).flatten().next().or_else(|| found.get(0)) else { continue };
            if !(kind.is_valid)(place.as_str()) {
                continue;
            }
            *counts.entry(kind.name).or_default() += 1;
            replaced.push_str(&current[end..place.start()]);
            replaced.push_str(&format!("<{}>", kind.name.to_uppercase()));
            end = place.end();
        }
        if end > 0 {
            replaced.push_str(&current[end..]);
            masked = Some(replaced);
        }
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(text: &str) -> Option<String> {
        masked(text, &mut BTreeMap::new())
    }

    #[test]
    fn personal_data_is_masked() {
        for (text, expected) in [
            ("电话13812345678，谢谢", "电话<MOBILE>，谢谢"),
            ("电话 13812345678，谢谢", "电话 <MOBILE>，谢谢"),
            ("+86 138-1234-5678", "<MOBILE>"),
            ("+8613812345678", "<MOBILE>"),
            ("详见www.a.cn每日口服阿司匹林100mg", "详见<URL>每日口服阿司匹林100mg"),
            ("身份证 11010519491231002X", "身份证 <IDENTITY_CARD>"),
            ("card 4111 1111 1111 1111 now", "card <BANK_CARD> now"),
            ("SSN 123-45-6789", "SSN <SSN>"),
            ("call (555) 123-4567 or 555-123-4567", "call <PHONE> or <PHONE>"),
            ("write to a.b@c.example.org", "write to <EMAIL>"),
            ("see https://example.org/a?b=1", "see <URL>"),
            ("住院号：123456", "住院号：<RECORD_NUMBER>"),
            ("DOB: 01/02/1980", "DOB: <DATE_OF_BIRTH>"),
            ("姓名：张三丰", "姓名：<NAME>"),
            ("Regards, Dr. Smith", "Regards, Dr. <NAME>"),
            ("from 192.168.0.1", "from <IP_ADDRESS>"),
        ] {
            let found = mask(text).unwrap_or_else(|| text.to_owned());
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn doses_codes_and_measures_are_not_personal() {
        for text in [
            "Take 500 mg 3 times a day, 1500 mg at most",
            "ICD-10 E11.9 and I10, PMID 21645374",
            "110105194912310021 is no identity card",
            "4111 1111 1111 1112 is no card",
            "BP 120/80, 5.1.2.3 of the guideline",
            "WBC 13812 /µL; 10000000000 cells",
            "000-12-3456 and 666-12-3456",
            "2020-01-02 to 2021-03-04, NCT01234567",
            "doi 10.1016/j.cell.2020.01.001",
        ] {
            assert_eq!(mask(text), None, "{text}");
        }
    }
}
