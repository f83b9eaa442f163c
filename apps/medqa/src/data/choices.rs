//! Rows of multiple choice, in the layouts of the usual benchmarks.

use super::mapped_object::MappedObject;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Names of the column with the right option, and the base of a number in it, if a number is allowed.
const ANSWERS: [(&str, Option<usize>); 6] = [
    ("answer_idx", Some(0)),
    ("cop", Some(0)),
    ("answer", Some(0)),
    ("Answer", None),
    ("answerKey", None),
    ("label", Some(0)),
];

/// A question with its options, and the right ones.
pub(super) struct Choice {
    pub question: String,
    pub answer: String,
}

/// Parses a row. The prompt is the question and its options, each on a line after its letter; the answer is the letter
/// and the text of the right option, one line for each right option.
///
/// # Errors
/// If the options or the right one are missing or cannot be told.
pub(super) fn parse(row: &MappedObject) -> Result<Choice> {
    let question = match row.get("question") {
        Some(_) => row.string("question")?,
        None => row
            .plain("Question")
            .and_then(Value::as_str)
            .map_or_else(|| row.string("question"), |q| Ok(q.to_owned()))?,
    };
    let options = options(row)?;
    let right = right_options(row, &options)?;
    let line = |index: &usize| options.get(*index).map(|text| format!("{}. {text}", letter(*index)));
    let all: Vec<String> = (0..options.len()).filter_map(|index| line(&index)).collect();
    let answer: Vec<String> = right.iter().filter_map(line).collect();
    Ok(Choice { question: format!("{question}\n{}", all.join("\n")), answer: answer.join("\n") })
}

fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

/// Returns the texts of the options, in the order of their letters. Empty ones at the end are left out.
fn options(row: &MappedObject) -> Result<Vec<String>> {
    let named =
        row.get("options").or_else(|| ["option", "choices", "Options"].into_iter().find_map(|key| row.plain(key)));
    let mut options = match named {
        Some(Value::Object(choices)) if choices.contains_key("text") => texts(choices.get("text")),
        Some(Value::Object(by_letter)) => by_letter.values().map(text).collect(),
        Some(Value::Array(list)) => list.iter().map(|item| text(item.get("value").unwrap_or(item))).collect(),
        Some(Value::String(lines)) => {
            Some(lines.lines().filter(|line| !line.trim().is_empty()).map(without_letter).collect())
        }
        Some(other) => bail!(row.unexpected("options", "a list, an object by letter, or lines", other)),
        None => {
            let columns = [["opa", "opb", "opc", "opd", "ope"], ["A", "B", "C", "D", "E"]];
            let found = columns.iter().find(|names| row.plain(names[0]).is_some());
            let names = found.context("expected the key `options`, or one key for each option, such as opa to opd")?;
            names.iter().filter_map(|name| row.plain(name)).map(text).collect()
        }
    }
    .context("`options`: expected the texts of the options")?;
    while options.last().is_some_and(|option| option.trim().is_empty()) {
        options.pop();
    }
    if !(2..=26).contains(&options.len()) {
        bail!("`options`: expected 2 to 26 options, found {}", options.len());
    }
    Ok(options)
}

fn texts(list: Option<&Value>) -> Option<Vec<String>> {
    list?.as_array()?.iter().map(text).collect()
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Removes the letter before an option, such as `A ` or `(B) ` or `C. `.
fn without_letter(line: &str) -> String {
    let line = line.trim().trim_start_matches(['(', '（']);
    let mut chars = line.chars();
    let letter = chars.next().is_some_and(|c| c.is_ascii_uppercase());
    let rest = chars.as_str().trim_start_matches([')', '）', '.', '．', '、', ':', '：']);
    if letter && (rest.len() < chars.as_str().len() || rest.starts_with([' ', '\t'])) {
        return rest.trim().to_owned();
    }
    line.to_owned()
}

/// Returns the indices of the right options.
fn right_options(row: &MappedObject, options: &[String]) -> Result<Vec<usize>> {
    let found = ANSWERS.into_iter().find_map(|(key, base)| {
        let value = if key == "answer" { row.get(key) } else { row.plain(key) };
        value.map(|value| (key, base, value))
    });
    let (key, base, value) = found.context("expected the key `answer`")?;
    let problem = || {
        let expected = format!("the letter, the text or the number from 0 of one of {} options", options.len());
        row.unexpected(key, &expected, value)
    };
    let within = |index: usize| if index < options.len() { Ok(vec![index]) } else { Err(problem()) };
    match (value, base) {
        (Value::Number(number), Some(base)) => {
            let index = number.as_u64().and_then(|number| (number as usize).checked_sub(base));
            if key == "cop" && index == Some(options.len()) {
                bail!(
                    "`cop`: expected a number from 0, as the hub's MedMCQA has it, found {number}: this file counts from 1; \
                     write the letter into a column `answer`, and remove `cop`"
                );
            }
            within(index.with_context(problem)?)
        }
        (Value::String(text), _) => {
            let text = text.trim();
            if let Some(index) = options.iter().position(|option| option == text) {
                return Ok(vec![index]);
            }
            let letters: Vec<char> =
                text.chars().filter(|c| !matches!(c, ',' | ' ' | '、' | '.' | '(' | ')')).collect();
            let index = |c: &char| c.is_ascii_alphabetic().then(|| (c.to_ascii_uppercase() as u8 - b'A') as usize);
            let indices: Option<Vec<usize>> = letters.iter().map(index).collect();
            let indices = indices.filter(|list| !list.is_empty() && list.iter().all(|&index| index < options.len()));
            indices.with_context(problem)
        }
        _ => Err(problem()),
    }
}
