//! One row of JSON, by its format.

use super::schema::{Columns, Format, Schema};
use anyhow::{Context, Result, bail};
use burn_llama::Message;
use serde_json::{Map, Value};

/// What a row says.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A prompt, and the answer that is learned as it stands.
    Answer { prompt: Vec<Message>, answer: String },
    /// A conversation, of which the assistant's turns are learned.
    Conversation(Vec<Turn>),
    /// PubMedQA's question about an abstract.
    PubMedQa { question: String, contexts: Vec<String>, decision: Option<String> },
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub message: Message,
    /// Whether it is learned.
    pub learned: bool,
}

/// The harness's prompt for PubMedQA.
pub fn pubmedqa_prompt(question: &str, contexts: &[String]) -> String {
    format!("Abstract: {}\nQuestion: {question}\nAnswer:", contexts.join("\n"))
}

/// What a row says. Errors name the key.
pub fn of(value: Value, schema: &Schema) -> Result<Content> {
    let Value::Object(row) = value else { bail!("expected an object, found {}", brief(&value)) };
    let row = Object { row: &row, columns: &schema.columns };
    match schema.format {
        Format::Qa => {
            let prompt = vec![Message::new("user", row.text("question")?)];
            Ok(Content::Answer { prompt, answer: row.text("answer")? })
        }
        Format::PubMedQa => pubmedqa(&row),
        Format::Alpaca => alpaca(&row),
        Format::Messages => messages(&row),
        Format::ShareGpt => sharegpt(&row),
    }
}

/// A JSON object whose columns may have names of their own.
struct Object<'a> {
    row: &'a Map<String, Value>,
    columns: &'a Columns,
}

impl<'a> Object<'a> {
    /// A column's value; null is absent.
    fn get(&self, column: &str) -> Option<&'a Value> {
        self.row.get(self.columns.name(column)).filter(|value| !value.is_null())
    }

    fn required(&self, column: &str) -> Result<&'a Value> {
        self.row.get(self.columns.name(column)).with_context(|| {
            let found: Vec<_> = self.row.keys().map(String::as_str).collect();
            let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
            format!("expected the key `{}`, found {found}", self.columns.name(column))
        })
    }

    fn wrong(&self, column: &str, expected: &str, found: &Value) -> anyhow::Error {
        anyhow::anyhow!("`{}`: expected {expected}, found {}", self.columns.name(column), brief(found))
    }

    fn text(&self, column: &str) -> Result<String> {
        match self.required(column)? {
            Value::String(text) => Ok(text.clone()),
            other => Err(self.wrong(column, "a string", other)),
        }
    }

    /// A text that may be absent; absent is empty.
    fn optional(&self, column: &str) -> Result<String> {
        if self.get(column).is_some() { self.text(column) } else { Ok(String::new()) }
    }

    fn list(&self, column: &str) -> Result<&'a [Value]> {
        let value = self.required(column)?;
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(column, "a list", value))
    }

    /// Refuses what would be left out of a conversation without a word.
    fn without(&self, keys: &[&str]) -> Result<()> {
        let empty = |value: &Value| match value {
            Value::Null => true,
            Value::String(text) => text.trim().is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        for key in keys {
            if let Some(value) = self.row.get(*key).filter(|value| !empty(value)) {
                bail!("`{key}`: expected none, as calls of tools are not supported, found {}", brief(value));
            }
        }
        Ok(())
    }
}

/// The start of a value, for a message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn pubmedqa(item: &Object) -> Result<Content> {
    let contexts = item.get("CONTEXTS").and_then(Value::as_array);
    let contexts = contexts.and_then(|list| list.iter().map(|c| c.as_str().map(str::to_owned)).collect());
    let decision = match item.get("final_decision") {
        None => None,
        Some(Value::String(word)) if ["yes", "no", "maybe"].contains(&word.as_str()) => Some(word.clone()),
        Some(other) => bail!(item.wrong("final_decision", "yes, no or maybe", other)),
    };
    let contexts = contexts.context("`CONTEXTS`: expected a list of strings")?;
    Ok(Content::PubMedQa { question: item.text("QUESTION")?, contexts, decision })
}

/// Alpaca's: the prompt is `instruction` and `input`, joined by a newline where both are there. With a `history` of
/// (prompt, answer) pairs the row is a conversation, of which every answer is learned.
fn alpaca(row: &Object) -> Result<Content> {
    let parts = [row.text("instruction")?, row.optional("input")?];
    let question = parts.iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("\n");
    let (system, answer) = (row.optional("system")?, row.text("output")?);
    let mut prompt = Vec::new();
    if !system.is_empty() {
        prompt.push(Message::new("system", system));
    }
    let history = if row.get("history").is_some() { row.list("history")? } else { &[] };
    for pair in history {
        let texts = pair.as_array().map(|pair| pair.iter().map(Value::as_str).collect::<Vec<_>>());
        let Some([Some(question), Some(answer)]) = texts.as_deref() else {
            bail!(row.wrong("history", "a list of [prompt, answer]", pair));
        };
        prompt.extend([Message::new("user", *question), Message::new("assistant", *answer)]);
    }
    prompt.push(Message::new("user", question));
    if history.is_empty() {
        return Ok(Content::Answer { prompt, answer });
    }
    prompt.push(Message::new("assistant", answer));
    Ok(Content::Conversation(prompt.into_iter().map(|message| Turn { message, learned: true }).collect()))
}

/// OpenAI's: a turn's `weight` of 0 keeps it from being learned.
fn messages(row: &Object) -> Result<Content> {
    row.without(&["tools", "functions"])?;
    let role = |name: &str| ["system", "developer", "user", "assistant", "tool"].into_iter().find(|role| *role == name);
    let expected = "system, developer, user, assistant or tool";
    Ok(Content::Conversation(turns(row, "messages", ("role", role), ("content", expected))?))
}

fn sharegpt(row: &Object) -> Result<Content> {
    row.without(&["tools"])?;
    let role = |name: &str| match name {
        "system" => Some("system"),
        "human" | "user" => Some("user"),
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => Some("assistant"),
        "observation" | "tool" => Some("tool"),
        _ => None,
    };
    let expected = "system, human, user, gpt, assistant, observation or tool";
    let mut turns = turns(row, "conversations", ("from", role), ("value", expected))?;
    let system = row.optional("system")?;
    if !system.is_empty() && turns.first().is_none_or(|turn| turn.message.role != "system") {
        turns.insert(0, Turn { message: Message::new("system", system), learned: false });
    }
    Ok(Content::Conversation(turns))
}

/// The turns in the list `column`: who speaks under the key `from`, what is said under the key `said`.
fn turns(
    row: &Object,
    column: &str,
    (from, role): (&str, fn(&str) -> Option<&'static str>),
    (said, roles): (&str, &str),
) -> Result<Vec<Turn>> {
    let turn = |value: &Value| {
        let Value::Object(turn) = value else { bail!("expected an object, found {}", brief(value)) };
        let turn = Object { row: turn, columns: row.columns };
        turn.without(&["tool_calls", "function_call"])?;
        let name = turn.text(from)?;
        let role = role(&name).ok_or_else(|| turn.wrong(from, roles, &Value::String(name)))?;
        let learned = match turn.get("weight") {
            None => true,
            Some(weight) => match weight.as_f64() {
                Some(weight) if weight == 0.0 || weight == 1.0 => weight == 1.0,
                _ => bail!(turn.wrong("weight", "0 or 1", weight)),
            },
        };
        Ok(Turn { message: Message::new(role, words(&turn, said)?), learned })
    };
    let list = row.list(column)?.iter().enumerate();
    let turns = list.map(|(i, value)| turn(value).with_context(|| format!("turn {}", i + 1)));
    turns.collect()
}

/// What is said: a string, or a list of parts that are texts.
fn words(turn: &Object, said: &str) -> Result<String> {
    let value = turn.required(said)?;
    let Value::Array(parts) = value else { return turn.text(said) };
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => Err(turn.wrong(said, "a string, or a list of parts of the type text", part)),
    };
    parts.iter().map(part).collect()
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
