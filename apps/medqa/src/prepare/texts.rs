//! The texts of a row, in place: what is cleaned, compared and counted in every format.

use crate::schema::{Format, Schema};
use serde_json::{Map, Value};

/// The part that a text has in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TextPart {
    System,
    Question,
    Answer,
    /// A text of its own, or one that belongs to a question, such as an abstract.
    Context,
}

/// The questions and the answers of a row, each joined by newlines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RowTexts {
    pub question: String,
    pub answer: String,
    pub all: String,
}

impl RowTexts {
    /// Collects the texts of a row. The question of a row of plain text is the text.
    pub(super) fn of(row: &mut Map<String, Value>, schema: &Schema) -> Self {
        let mut texts = Self::default();
        let push = |into: &mut String, text: &str| {
            if !into.is_empty() {
                into.push('\n');
            }
            into.push_str(text);
        };
        for_each_text(row, schema, &mut |part, text| {
            push(&mut texts.all, text);
            match part {
                TextPart::Question => push(&mut texts.question, text),
                TextPart::Answer => push(&mut texts.answer, text),
                TextPart::Context if schema.format == Format::Text => push(&mut texts.question, text),
                TextPart::Context | TextPart::System => {}
            }
        });
        texts
    }
}

/// The columns of multiple choice, in the layouts of the usual benchmarks.
const CHOICES: [(&str, TextPart); 16] = [
    ("question", TextPart::Question),
    ("Question", TextPart::Question),
    ("options", TextPart::Context),
    ("option", TextPart::Context),
    ("choices", TextPart::Context),
    ("Options", TextPart::Context),
    ("opa", TextPart::Context),
    ("opb", TextPart::Context),
    ("opc", TextPart::Context),
    ("opd", TextPart::Context),
    ("ope", TextPart::Context),
    ("A", TextPart::Context),
    ("B", TextPart::Context),
    ("C", TextPart::Context),
    ("D", TextPart::Context),
    ("E", TextPart::Context),
];

/// Calls `visit` for every text of the row, in the order of the conversation. Values that are not texts are left out.
pub(super) fn for_each_text(
    row: &mut Map<String, Value>,
    schema: &Schema,
    visit: &mut dyn FnMut(TextPart, &mut String),
) {
    let name = |column: &str| schema.columns.name(column).to_owned();
    let columns: &[(&str, TextPart)] = match schema.format {
        Format::Qa => &[("question", TextPart::Question), ("answer", TextPart::Answer)],
        Format::PubMedQa => {
            &[("CONTEXTS", TextPart::Context), ("QUESTION", TextPart::Question), ("LONG_ANSWER", TextPart::Answer)]
        }
        Format::Alpaca => &[
            ("system", TextPart::System),
            ("instruction", TextPart::Question),
            ("input", TextPart::Question),
            ("output", TextPart::Answer),
        ],
        Format::MultipleChoice => &CHOICES,
        Format::Text => &[("text", TextPart::Context)],
        Format::PromptCompletion => &[("prompt", TextPart::Question), ("completion", TextPart::Answer)],
        Format::Messages | Format::ShareGpt => &[("system", TextPart::System)],
    };
    if schema.format == Format::Alpaca {
        visit_history(row.get_mut(&name("history")), visit);
    }
    for (column, part) in columns {
        visit_value(row.get_mut(&name(column)), *part, schema, visit);
    }
    let turns = match schema.format {
        Format::Messages => "messages",
        Format::ShareGpt => "conversations",
        _ => return,
    };
    visit_value(row.get_mut(&name(turns)), TextPart::Context, schema, visit);
}

/// Visits a text, the texts of a list or of an object, or the turns of a conversation.
fn visit_value(
    value: Option<&mut Value>,
    part: TextPart,
    schema: &Schema,
    visit: &mut dyn FnMut(TextPart, &mut String),
) {
    match value {
        Some(Value::String(text)) if !text.is_empty() => visit(part, text),
        Some(Value::Array(items)) => items.iter_mut().for_each(|item| visit_value(Some(item), part, schema, visit)),
        Some(Value::Object(turn)) => visit_turn(turn, part, schema, visit),
        _ => {}
    }
}

/// Visits the text of a turn, or the texts of an object of options.
fn visit_turn(
    turn: &mut Map<String, Value>,
    part: TextPart,
    schema: &Schema,
    visit: &mut dyn FnMut(TextPart, &mut String),
) {
    let keys = if schema.format == Format::ShareGpt { ["from", "value"] } else { ["role", "content"] };
    let [role, text] = keys.map(|key| schema.columns.name(key).to_owned());
    let Some(name) = turn.get(&role).and_then(Value::as_str) else {
        if turn.get("type").is_some() {
            return visit_value(turn.get_mut("text"), part, schema, visit);
        }
        return turn.values_mut().for_each(|value| visit_value(Some(value), part, schema, visit));
    };
    let part = match name {
        "system" | "developer" => TextPart::System,
        "user" | "human" => TextPart::Question,
        "assistant" | "gpt" | "chatgpt" | "bing" | "bard" => TextPart::Answer,
        _ => TextPart::Context,
    };
    visit_value(turn.get_mut(&text), part, schema, visit);
}

fn visit_history(history: Option<&mut Value>, visit: &mut dyn FnMut(TextPart, &mut String)) {
    for pair in history.and_then(Value::as_array_mut).into_iter().flatten() {
        for (index, text) in pair.as_array_mut().into_iter().flatten().enumerate() {
            if let Value::String(text) = text {
                visit(if index == 0 { TextPart::Question } else { TextPart::Answer }, text);
            }
        }
    }
}
