//! Repairs of a text: Unicode, HTML and white space. Nothing medical is lost: signs, doses and units stay as they are.

use regex::{Captures, Regex};
use std::{borrow::Cow, sync::LazyLock};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// A step of cleaning: its name in the counts, and its work.
pub(super) struct RepairStep {
    pub name: &'static str,
    /// Returns the repaired text; borrowed if it needs no repair.
    pub repair: fn(&str) -> Cow<'_, str>,
}

/// The steps, in their order.
pub(super) const REPAIRS: [RepairStep; 4] = [
    RepairStep { name: "unicode", repair: unicode },
    RepairStep { name: "html", repair: html },
    RepairStep { name: "literal line ends", repair: literal_line_ends },
    RepairStep { name: "white space", repair: white_space },
];

/// Compiles a constant pattern, which the tests run.
fn pattern(text: &str) -> Regex {
    Regex::new(text).unwrap_or_else(|error| unreachable!("{error}"))
}

/// Composes characters (NFC) and removes marks without width, replacement characters and control characters.
fn unicode(text: &str) -> Cow<'_, str> {
    let composed: Cow<str> = match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => Cow::Borrowed(text),
        _ => Cow::Owned(text.nfc().collect()),
    };
    if !composed.contains(is_unwanted) {
        return composed;
    }
    let (mut kept, mut before) = (String::with_capacity(composed.len()), ' ');
    for c in composed.chars() {
        // Joiners belong to emoji and to the scripts of India and Persia.
        let joins = matches!(c, '\u{200c}' | '\u{200d}')
            && (before >= '\u{1f000}' || ('\u{600}'..'\u{e00}').contains(&before) || before == '\u{fe0f}');
        if !is_unwanted(c) || joins {
            kept.push(c);
        }
        before = c;
    }
    Cow::Owned(kept)
}

fn is_unwanted(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t' | '\r') || matches!(c, '\u{feff}' | '\u{200b}'..='\u{200d}' | '\u{fffd}')
}

static ENTITY: LazyLock<Regex> =
    LazyLock::new(|| pattern("&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"));
static HIDDEN: LazyLock<Regex> =
    LazyLock::new(|| pattern("(?is)<!--.*?-->|<script\\b[^>]*>.*?</script>|<style\\b[^>]*>.*?</style>"));
/// Tags of HTML, with attributes that have values, so that "if p <b and c> 3" is none.
static TAG: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        "(?i)<(/?)(p|br|div|span|b|i|em|strong|u|s|ul|ol|li|dl|dt|dd|a|h[1-6]|table|tbody|thead|tr|td|th|img|font|center|sup|sub|\
         pre|code|blockquote|hr|section|article|iframe|small|big|label|body|html|head|title|meta|link|o:p)\
         ((?:\\s+[a-z:-]+\\s*=\\s*(?:\"[^\"]*\"|'[^']*'|[^\\s<>\"']+))*)\\s*/?>",
    )
});

/// Replaces entities by their characters, tags that end a line by line ends, and removes other tags.
fn html(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<']) {
        return Cow::Borrowed(text);
    }
    let entity = |found: &Captures| match found.get(0).map_or("", |all| all.as_str()) {
        "&nbsp;" | "&#160;" | "&#xa0;" => " ".to_owned(),
        entity => htmlize::unescape(entity).into_owned(),
    };
    let plain = ENTITY.replace_all(text, entity);
    let plain = match HIDDEN.replace_all(&plain, "") {
        Cow::Borrowed(_) => plain,
        Cow::Owned(rest) => Cow::Owned(rest),
    };
    let tag = |found: &Captures| {
        let close = !found[1].is_empty();
        match found[2].to_ascii_lowercase().as_str() {
            "br" | "hr" | "p" | "div" | "tr" | "li" | "ul" | "ol" | "table" | "blockquote" | "section" | "article"
            | "pre" | "dt" | "dd" => "\n",
            heading if heading.len() == 2 && heading.starts_with('h') => "\n",
            "td" | "th" if close => "\t",
            // Without a mark, 10<sup>9</sup> would become 109.
            "sup" if !close => "^",
            _ => "",
        }
    };
    match TAG.replace_all(&plain, tag) {
        Cow::Borrowed(_) => plain,
        Cow::Owned(rest) => Cow::Owned(rest),
    }
}

/// Replaces line ends that are spelled out, if the text has no other ones.
fn literal_line_ends(text: &str) -> Cow<'_, str> {
    if text.contains('\n') || !text.contains("\\n") {
        return Cow::Borrowed(text);
    }
    let parts: Vec<&str> = text.split("\\n").collect();
    let mut repaired = parts[0].to_owned();
    for part in &parts[1..] {
        // A lower-case letter would be part of a command of TeX, such as \nu.
        let is_end = !part.starts_with(|c: char| c.is_ascii_lowercase());
        repaired.push_str(if is_end { "\n" } else { "\\n" });
        repaired.push_str(part);
    }
    if repaired == text { Cow::Borrowed(text) } else { Cow::Owned(repaired) }
}

/// Trims, joins runs of spaces, keeps at most one blank line, and drops lines that repeat the one before.
fn white_space(text: &str) -> Cow<'_, str> {
    let mut lines: Vec<String> = Vec::new();
    for line in text.replace("\r\n", "\n").replace('\r', "\n").split('\n') {
        let mut joined = String::with_capacity(line.len());
        for c in line.trim_end().chars() {
            let space = matches!(c, ' ' | '\u{a0}' | '\u{3000}');
            if !space || !joined.ends_with(' ') {
                joined.push(if space { ' ' } else { c });
            }
        }
        let repeats = lines.last().is_some_and(|last| *last == joined && (joined.is_empty() || joined.len() > 20));
        if !repeats {
            lines.push(joined);
        }
    }
    let repaired = lines.join("\n").trim().to_owned();
    if repaired == text { Cow::Borrowed(text) } else { Cow::Owned(repaired) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repaired(text: &str) -> String {
        REPAIRS.iter().fold(text.to_owned(), |text, step| (step.repair)(&text).into_owned())
    }

    #[test]
    fn texts_are_repaired_and_nothing_medical_is_lost() {
        for (text, expected) in [
            ("<p>Rest &amp; drink.</p><br/>Then&nbsp;sleep.", "Rest & drink.\n\nThen sleep."),
            ("<a href=\"http://x\" class='y'>Asthma</a> is <b>common</b>", "Asthma is common"),
            ("10<sup>9</sup>/L, H<sub>2</sub>O", "10^9/L, H2O"),
            ("<script>alert(1)</script>a<!-- b -->", "a"),
            ("&lt;b&gt;bold&lt;/b&gt; and &#946;-blocker", "bold and β-blocker"),
            ("zero\u{200b}width\u{feff} and \u{0}control", "zerowidth and control"),
            ("e\u{301}", "é"),
            ("one\\nTwo\\n- three", "one\nTwo\n- three"),
            ("frequency \\nu = 5", "frequency \\nu = 5"),
            ("  a   b\r\n\r\n\r\nc  ", "a b\n\nc"),
        ] {
            assert_eq!(repaired(text), expected, "{text}");
        }
        for kept in [
            "p < 0.05 and > 3",
            "if p <b and c> 3, BP <140/90 mmHg, eGFR<60",
            "5 mg/kg b.i.d., 2.5–5 µg, ½ tablet, 10⁹/L, CO₂, 37 ℃, ①",
            "E11.9, I10, Z79.4; T&A, Q&A; R&D",
            "血压 ≥140/90 mmHg，每日２次；“饭后”服用",
            "👩\u{200d}⚕\u{fe0f} doctor",
            "Na+ 135-145 mmol/L; [Ca2+] ~2.5; a/b ± 1 %",
        ] {
            assert_eq!(repaired(kept), kept);
        }
    }
}
