//! Parsing one JSON row according to its format.

use super::{
    choices::{self, Choice},
    mapped_object::{MappedObject, excerpt},
};
use crate::schema::{Format, Schema};
use anyhow::{Context, Result, bail};
use burn_llama::Message;
use serde_json::{Map, Value, json};

/// The content of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum RowContent {
    /// A prompt and its answer, which is learned.
    Answer { prompt: Vec<Message>, answer: String },
    /// A conversation, in which the assistant's turns are learned.
    Conversation(Conversation),
    /// A PubMedQA question about an abstract.
    PubMedQa { question: String, contexts: Vec<String>, decision: Option<String> },
    /// A text, all of which is learned.
    Text(String),
}

impl RowContent {
    /// Returns the questions of the row, joined by newlines; of a plain text, the text.
    pub fn question(&self) -> String {
        let of = |messages: &[Message]| {
            let asked = messages.iter().filter(|message| message.role == "user").map(Message::text);
            asked.collect::<Vec<_>>().join("\n")
        };
        match self {
            Self::Answer { prompt, .. } => of(prompt),
            Self::Conversation(conversation) => of(&conversation.messages()),
            Self::PubMedQa { question, .. } => question.clone(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// A conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    pub turns: Vec<Turn>,
    /// List of the tools that the assistant may call, as the chat template expects them.
    pub tools: Option<Value>,
}

impl Conversation {
    /// Returns the messages of all turns.
    pub fn messages(&self) -> Vec<Message> {
        self.turns.iter().map(|turn| turn.message.clone()).collect()
    }
}

impl From<Vec<Turn>> for Conversation {
    fn from(turns: Vec<Turn>) -> Self {
        Self { turns, tools: None }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub message: Message,
    /// True if the turn may be learned; only the assistant's turns are.
    pub learned: bool,
}

/// Returns the prompt that lm-evaluation-harness uses for PubMedQA.
pub fn pubmedqa_prompt(question: &str, contexts: &[String]) -> String {
    format!("Abstract: {}\nQuestion: {question}\nAnswer:", contexts.join("\n"))
}

/// Parses a row. Errors name the key.
pub fn parse_row(row: &Map<String, Value>, schema: &Schema) -> Result<RowContent> {
    let row = MappedObject { row, columns: &schema.columns };
    match schema.format {
        Format::Qa => {
            let prompt = vec![Message::new("user", row.string("question")?)];
            Ok(RowContent::Answer { prompt, answer: row.string("answer")? })
        }
        Format::PubMedQa => parse_pubmedqa(&row),
        Format::Alpaca => parse_alpaca(&row),
        Format::Messages => parse_messages(&row),
        Format::ShareGpt => parse_sharegpt(&row),
        Format::PromptCompletion => parse_prompt_completion(&row),
        Format::MultipleChoice => {
            let Choice { question, answer } = choices::parse(&row)?;
            Ok(RowContent::Answer { prompt: vec![Message::new("user", question)], answer })
        }
        Format::Text => Ok(RowContent::Text(row.string("text")?)),
    }
}

fn parse_pubmedqa(item: &MappedObject) -> Result<RowContent> {
    let contexts = item.get("CONTEXTS").and_then(Value::as_array);
    let contexts = contexts.and_then(|list| list.iter().map(|c| c.as_str().map(str::to_owned)).collect());
    let decision = match item.get("final_decision") {
        None => None,
        Some(Value::String(word)) if ["yes", "no", "maybe"].contains(&word.as_str()) => Some(word.clone()),
        Some(other) => bail!(item.unexpected("final_decision", "yes, no or maybe", other)),
    };
    let contexts = contexts.context("`CONTEXTS`: expected a list of strings")?;
    Ok(RowContent::PubMedQa { question: item.string("QUESTION")?, contexts, decision })
}

/// Parses an Alpaca row. The prompt is `instruction` and `input`, joined by a newline if both are present. With a
/// `history` of (prompt, answer) pairs, the row is a conversation in which every answer is learned.
fn parse_alpaca(row: &MappedObject) -> Result<RowContent> {
    let parts = [row.string("instruction")?, row.string_or_empty("input")?];
    let question = parts.iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("\n");
    let (system, answer) = (row.string_or_empty("system")?, row.string("output")?);
    let mut prompt = Vec::new();
    if !system.is_empty() {
        prompt.push(Message::new("system", system));
    }
    let history = if row.get("history").is_some() { row.array("history")? } else { &[] };
    for pair in history {
        let texts = pair.as_array().map(|pair| pair.iter().map(Value::as_str).collect::<Vec<_>>());
        let Some([Some(question), Some(answer)]) = texts.as_deref() else {
            bail!(row.unexpected("history", "a list of [prompt, answer]", pair));
        };
        prompt.extend([Message::new("user", *question), Message::new("assistant", *answer)]);
    }
    prompt.push(Message::new("user", question));
    if history.is_empty() {
        return Ok(RowContent::Answer { prompt, answer });
    }
    prompt.push(Message::new("assistant", answer));
    let turns: Vec<Turn> = prompt.into_iter().map(|message| Turn { message, learned: true }).collect();
    Ok(RowContent::Conversation(turns.into()))
}

/// Parses an OpenAI row. A turn with `weight` 0 is not learned.
fn parse_messages(row: &MappedObject) -> Result<RowContent> {
    Ok(RowContent::Conversation(Conversation {
        turns: parse_turns(row, "messages", &MESSAGE_KEYS)?,
        tools: parse_tools(row)?,
    }))
}

fn parse_sharegpt(row: &MappedObject) -> Result<RowContent> {
    let keys = TurnKeys {
        role: "from",
        text: "value",
        parse_role: |name| match name {
            "system" => Some("system"),
            "human" | "user" => Some("user"),
            "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => Some("assistant"),
            "observation" | "tool" => Some("tool"),
            _ => None,
        },
        expected_roles: "system, human, user, gpt, assistant, observation or tool",
    };
    let mut turns = parse_turns(row, "conversations", &keys)?;
    let system = row.string_or_empty("system")?;
    if !system.is_empty() && turns.first().is_none_or(|turn| turn.message.role != "system") {
        turns.insert(0, Turn { message: Message::new("system", system), learned: false });
    }
    Ok(RowContent::Conversation(Conversation { turns, tools: parse_tools(row)? }))
}

/// Parses a row of TRL: a prompt and its completion, both texts or both lists of messages. Only the completion is
/// learned.
fn parse_prompt_completion(row: &MappedObject) -> Result<RowContent> {
    if !matches!(row.get("prompt"), Some(Value::Array(_))) {
        let prompt = vec![Message::new("user", row.string("prompt")?)];
        return Ok(RowContent::Answer { prompt, answer: row.string("completion")? });
    }
    let mut turns = parse_turns(row, "prompt", &MESSAGE_KEYS)?;
    turns.iter_mut().for_each(|turn| turn.learned = false);
    turns.extend(parse_turns(row, "completion", &MESSAGE_KEYS)?);
    Ok(RowContent::Conversation(Conversation { turns, tools: parse_tools(row)? }))
}

/// Returns the tools of a row: the list `tools`, which may be written as a JSON string (LLaMA-Factory), or the list
/// `functions` of OpenAI's older rows, each of which becomes a tool.
fn parse_tools(row: &MappedObject) -> Result<Option<Value>> {
    let list = |key: &str| -> Result<Option<Vec<Value>>> {
        let Some(found) = row.row.get(key).filter(|value| !is_empty(value)) else { return Ok(None) };
        let parsed = found.as_str().and_then(|text| serde_json::from_str(text).ok());
        match parsed.as_ref().unwrap_or(found) {
            Value::Array(list) if list.iter().all(Value::is_object) => Ok(Some(list.clone())),
            _ => bail!("`{key}`: expected a list of objects, found {}", excerpt(found)),
        }
    };
    let functions = list("functions")?;
    let functions =
        functions.map(|list| list.into_iter().map(|f| json!({"type": "function", "function": f})).collect());
    Ok(list("tools")?.or(functions).map(Value::Array))
}

/// Returns whether a value says nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The keys of a turn, and the roles that it may have.
struct TurnKeys {
    /// Key of the role.
    role: &'static str,
    /// Key of the text.
    text: &'static str,
    /// Maps a role of the format to the role in the chat template.
    parse_role: fn(&str) -> Option<&'static str>,
    /// The format's roles, for error messages.
    expected_roles: &'static str,
}

/// The keys of a turn in OpenAI's rows.
const MESSAGE_KEYS: TurnKeys = TurnKeys {
    role: "role",
    text: "content",
    parse_role: |name| ["system", "developer", "user", "assistant", "tool"].into_iter().find(|role| *role == name),
    expected_roles: "system, developer, user, assistant or tool",
};

/// Keys of a turn that say whether it is learned: OpenAI's, and axolotl's two.
const LEARNED_KEYS: [&str; 3] = ["weight", "train", "training"];

/// Parses the turns in the list `column`.
fn parse_turns(row: &MappedObject, column: &str, keys: &TurnKeys) -> Result<Vec<Turn>> {
    let turn = |value: &Value| {
        let Value::Object(turn) = value else { bail!("expected an object, found {}", excerpt(value)) };
        let turn = MappedObject { row: turn, columns: row.columns };
        let name = turn.string(keys.role)?;
        let role = (keys.parse_role)(&name)
            .ok_or_else(|| turn.unexpected(keys.role, keys.expected_roles, &Value::String(name)))?;
        let read = LEARNED_KEYS.into_iter().chain([keys.role, keys.text].map(|key| turn.columns.name(key)));
        let read: Vec<&str> = read.collect();
        let others = turn.row.iter().filter(|(key, _)| !read.contains(&key.as_str()));
        let fields: Map<_, _> = others.map(|(key, value)| (key.clone(), value.clone())).collect();
        let content = turn_text(&turn, keys.text, &fields)?;
        Ok(Turn { message: Message { role: role.to_owned(), content, fields }, learned: is_learned(&turn)? })
    };
    let list = row.array(column)?.iter().enumerate();
    let turns = list.map(|(i, value)| turn(value).with_context(|| format!("turn {}", i + 1)));
    turns.collect()
}

/// Returns whether a turn is learned: unless its `weight` is 0, or `train` or `training` is false.
fn is_learned(turn: &MappedObject) -> Result<bool> {
    let mut learned = true;
    for key in LEARNED_KEYS {
        learned &= match (key, turn.get(key)) {
            (_, None) => true,
            ("weight", Some(weight)) => match weight.as_f64() {
                Some(weight) if weight == 0.0 || weight == 1.0 => weight == 1.0,
                _ => bail!(turn.unexpected(key, "0 or 1", weight)),
            },
            (_, Some(flag)) => flag.as_bool().ok_or_else(|| turn.unexpected(key, "true or false", flag))?,
        };
    }
    Ok(learned)
}

/// Returns the text of a turn, which is a string or a list of text parts; beside a call of tools there may be none.
fn turn_text(turn: &MappedObject, key: &str, fields: &Map<String, Value>) -> Result<Option<String>> {
    let calls =
        ["tool_calls", "function_call"].iter().any(|key| fields.get(*key).is_some_and(|value| !is_empty(value)));
    if calls && turn.get(key).is_none() {
        return Ok(None);
    }
    let value = turn.required(key)?;
    let Value::Array(parts) = value else { return turn.string(key).map(Some) };
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => Err(turn.unexpected(key, "a string, or a list of parts of the type text", part)),
    };
    parts.iter().map(part).collect::<Result<String>>().map(Some)
}

#[cfg(test)]
#[path = "content_tests.rs"]
mod tests;
