//! Phone and identity numbers in texts. They must not leave this machine unless the user says so.

/// The kinds of numbers that are found.
const MOBILE: &str = "a phone number";
const IDENTITY: &str = "an identity number";

/// Returns the kind of the first phone or identity number in a text.
pub(super) fn find(text: &str) -> Option<&'static str> {
    let characters: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < characters.len() {
        if !is_part(characters[at]) {
            at += 1;
            continue;
        }
        let start = at;
        while at < characters.len() && is_part(characters[at]) {
            at += 1;
        }
        // The check digit of an identity card may be an X.
        if characters[at - 1].is_ascii_digit() && characters.get(at).is_some_and(|c| c.eq_ignore_ascii_case(&'x')) {
            at += 1;
        }
        // A number that is a part of a word is a code, not a number of a person.
        let free = |c: Option<&char>| c.is_none_or(|c| !c.is_ascii_alphabetic());
        let run: String = characters[start..at].iter().collect();
        let before = if run.starts_with(' ') { None } else { start.checked_sub(1).and_then(|at| characters.get(at)) };
        let after = if run.ends_with(' ') { None } else { characters.get(at) };
        if let Some(kind) = kind(run.trim()).filter(|_| free(before) && free(after)) {
            return Some(kind);
        }
    }
    None
}

/// Characters that phone and identity numbers are made of.
fn is_part(c: char) -> bool {
    c.is_ascii_digit() || matches!(c, '-' | '(' | ')' | '+' | ' ')
}

fn kind(run: &str) -> Option<&'static str> {
    run.split(' ')
        .map(|word| word.trim_matches(['-', '(', ')']))
        .find_map(identity)
        .or_else(|| {
            let words = run.split(' ').map(|word| word.trim_matches(['-', '(', ')']));
            words.into_iter().any(is_mobile).then_some(MOBILE)
        })
        .or_else(|| is_separated_phone(run).then_some(MOBILE))
}

/// Recognizes a mainland identity card by its check digit, an old one by its date, and a US social security number.
fn identity(word: &str) -> Option<&'static str> {
    let digits = word.chars().all(|c| c.is_ascii_digit());
    let card = word.len() == 18 && has_check_digit(word);
    let old_card = word.len() == 15 && digits && is_date(&word[8..12]);
    (card || old_card || is_social_security(word)).then_some(IDENTITY)
}

/// Checks the last character of an identity card (GB 11643-1999), and the date in it.
fn has_check_digit(word: &str) -> bool {
    const WEIGHTS: [u32; 17] = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2];
    const CHECKS: &[u8; 11] = b"10X98765432";
    let bytes = word.as_bytes();
    let (digits, last) = bytes.split_at(17);
    if !digits.iter().all(u8::is_ascii_digit) || !is_date(&word[10..14]) {
        return false;
    }
    let sum: u32 = digits.iter().zip(WEIGHTS).map(|(digit, weight)| u32::from(digit - b'0') * weight).sum();
    last.first().is_some_and(|last| last.to_ascii_uppercase() == CHECKS[(sum % 11) as usize])
}

/// Returns whether four digits are a month and a day.
fn is_date(digits: &str) -> bool {
    let part = |range: std::ops::Range<usize>| digits.get(range).and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
    (1..=12).contains(&part(0..2)) && (1..=31).contains(&part(2..4))
}

fn is_social_security(word: &str) -> bool {
    let parts: Vec<&str> = word.split('-').collect();
    let [area, group, serial] = parts.as_slice() else { return false };
    let digits = [area, group, serial].iter().all(|part| part.chars().all(|c| c.is_ascii_digit()));
    digits
        && (area.len(), group.len(), serial.len()) == (3, 2, 4)
        && !matches!(*area, "000" | "666")
        && !area.starts_with('9')
        && *group != "00"
        && *serial != "0000"
}

/// Recognizes a mainland mobile number, with its country code or without.
fn is_mobile(word: &str) -> bool {
    let word: String = word.trim_start_matches("+86").chars().filter(|c| *c != '-').collect();
    let bytes = word.as_bytes();
    bytes.len() == 11 && bytes.iter().all(u8::is_ascii_digit) && bytes[0] == b'1' && (b'3'..=b'9').contains(&bytes[1])
}

/// Recognizes numbers with separators: `(555) 123-4567`, `555-123-4567`, `+44 20 7946 0958`, `138 1234 5678`.
fn is_separated_phone(run: &str) -> bool {
    let digits = run.chars().filter(char::is_ascii_digit).count();
    let groups: Vec<usize> =
        run.split(|c: char| !c.is_ascii_digit()).filter(|group| !group.is_empty()).map(str::len).collect();
    let international = run.starts_with('+') && (8..=15).contains(&digits);
    let american = groups.ends_with(&[3, 3, 4]) && groups.len() <= 4 && run.contains(['-', '(']);
    let mobile = groups == [3, 4, 4] && is_mobile(&run.chars().filter(char::is_ascii_digit).collect::<String>());
    international || american || mobile
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are invented; the identity card has a right check digit.
    #[test]
    fn numbers_of_people_are_found_and_doses_are_not() {
        for text in [
            "请拨打13812345678联系",
            "电话 +8613812345678。",
            "138 1234 5678",
            "Call (555) 123-4567 now",
            "phone: 555-123-4567",
            "+44 20 7946 0958",
        ] {
            assert_eq!(find(text), Some(MOBILE), "{text}");
        }
        for text in ["身份证11010519491231002X", "SSN 123-45-6789.", "证号 110105491231002"] {
            assert_eq!(find(text), Some(IDENTITY), "{text}");
        }
        for text in [
            "Take 500 mg every 6-8 hours, at most 4000 mg",
            "p < 0.05 (n = 12345678901)",
            "ICD-10 E11.9, PMID 31452104",
            "11010519491231002Y",
            "110105194912310021",
            "128-12345-99",
            "1-800 units",
            "140/90 mmHg, 2019-12-31",
            "NM13812345678a",
            "blood count 5.2 x 10 9",
            "",
        ] {
            assert_eq!(find(text), None, "{text}");
        }
    }
}
