//! The verb `data convert`: the same rows in another format, or in another kind of file.

use super::output::{InputArgs, InputRow, RowOutput};
use crate::{
    data::{Conversation, RowContent, content, pubmedqa_prompt},
    schema::{Format, Schema},
};
use anyhow::{Context, Result, bail};
use burn_llama::Message;
use clap::Args;
use serde_json::{Map, Value, json};
use std::{path::PathBuf, sync::Arc};

/// Arguments of `data convert`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConvertRowsArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// Format to write; by default the rows stay as they are, and only the kind of file changes
    #[arg(long)]
    pub to: Option<Format>,
    /// File to write; its name ends in .jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the verb. Other columns than those of the format are kept under their names.
///
/// # Errors
/// If a row has a mistake, or cannot be said in the other format.
pub(super) fn convert(args: &ConvertRowsArgs) -> Result<Value> {
    let mut output = RowOutput::new(&args.out);
    let schema = args.to.map(|format| Arc::new(Schema { format, ..Schema::default() }));
    for row in args.input.rows()? {
        let row = row?;
        let row = if schema.is_some() { InputRow::new(row) } else { InputRow::in_any_form(row) };
        let InputRow { location, schema: from, row } = row?;
        match &schema {
            Some(to) if to.format != from.format || !from.columns.is_empty() => {
                let converted = converted(&row, &from, to.format).with_context(|| location.clone())?;
                output.keep(&converted, to)?;
            }
            Some(to) => output.keep(&row, to)?,
            None => output.keep(&row, &from)?,
        }
    }
    output.finish("convert", Value::Null)
}

/// Returns a row in another format.
fn converted(row: &Map<String, Value>, from: &Schema, to: Format) -> Result<Map<String, Value>> {
    let mut extra = row.clone();
    let multiple_choice = from.format == Format::MultipleChoice;
    for column in from.format.columns().iter().filter(|column| !multiple_choice || **column != "options") {
        extra.shift_remove(from.columns.name(column));
    }
    let conversation = match content::parse_row(row, from)? {
        RowContent::Conversation(conversation) => conversation,
        RowContent::Answer { prompt, answer } => {
            let messages = prompt.into_iter().chain([Message::new("assistant", answer)]);
            messages.map(|message| content::Turn { message, learned: true }).collect::<Vec<_>>().into()
        }
        RowContent::PubMedQa { question, contexts, decision } => {
            let decision = decision.context("`final_decision` is missing")?;
            let texts = [("user", pubmedqa_prompt(&question, &contexts)), ("assistant", decision)];
            texts.map(|(role, text)| content::Turn { message: Message::new(role, text), learned: true }).to_vec().into()
        }
        RowContent::Text(_) => bail!("expected questions and answers, found plain text, which has no other format"),
    };
    if from.format == Format::Alpaca
        && let Some(input) = row.get(from.columns.name("input")).filter(|input| **input != "")
    {
        // By this column, `instruction` and `input` can be told apart again.
        extra.insert("input".to_owned(), input.clone());
    }
    for key in ["tools", "functions"] {
        extra.shift_remove(key);
    }
    let mut columns = match to {
        Format::Qa => qa(&conversation)?,
        Format::Alpaca => alpaca(&conversation, &mut extra)?,
        Format::Messages => turns(&conversation, "messages", ["role", "content"], &|role| Some(role))?,
        Format::ShareGpt => turns(&conversation, "conversations", ["from", "value"], &|role| match role {
            "system" => Some("system"),
            "user" => Some("human"),
            "assistant" => Some("gpt"),
            "tool" => Some("observation"),
            _ => None,
        })?,
        Format::PromptCompletion => prompt_completion(&conversation)?,
        Format::PubMedQa | Format::MultipleChoice | Format::Text => {
            bail!("expected --to qa, alpaca, messages, sharegpt or prompt-completion, found {}", to.name())
        }
    };
    if let Some((name, _)) = extra.iter().find(|(name, _)| columns.contains_key(*name)) {
        bail!("the other column `{name}` has the name of a column of {}; rename it first", to.name());
    }
    columns.extend(extra);
    Ok(columns)
}

/// Returns the question and the answer, if there is nothing else.
fn single_turn(conversation: &Conversation) -> Option<(&Message, &Message)> {
    let plain = |message: &Message| message.fields.is_empty() && message.content.is_some();
    match conversation.turns.as_slice() {
        [question, answer]
            if question.message.role == "user"
                && answer.message.role == "assistant"
                && answer.learned
                && conversation.tools.is_none()
                && plain(&question.message)
                && plain(&answer.message) =>
        {
            Some((&question.message, &answer.message))
        }
        _ => None,
    }
}

fn qa(conversation: &Conversation) -> Result<Map<String, Value>> {
    let (question, answer) = single_turn(conversation).context(
        "expected one question and one answer, found other turns, tools or fields; messages and sharegpt hold them",
    )?;
    Ok(object([("question", question.text().into()), ("answer", answer.text().into())]))
}

fn prompt_completion(conversation: &Conversation) -> Result<Map<String, Value>> {
    if let Some((question, answer)) = single_turn(conversation) {
        return Ok(object([("prompt", question.text().into()), ("completion", answer.text().into())]));
    }
    let mut all = turns(conversation, "prompt", ["role", "content"], &|role| Some(role))?;
    let last = conversation.turns.iter().position(|turn| turn.message.role == "assistant" && turn.learned);
    let messages = all.get_mut("prompt").and_then(Value::as_array_mut).context("expected turns")?;
    let completion = messages.split_off(last.context("expected an answer that is learned, found none")?);
    if completion.len() > 1 {
        bail!(
            "expected one answer, the last turn, found {} turns to learn; messages and sharegpt hold them",
            completion.len()
        );
    }
    all.insert("completion".to_owned(), completion.into());
    Ok(all)
}

fn alpaca(conversation: &Conversation, extra: &mut Map<String, Value>) -> Result<Map<String, Value>> {
    let expected =
        "expected questions and answers in turn, found other turns, tools or fields; messages and sharegpt hold them";
    let mut turns = conversation.turns.as_slice();
    if conversation.tools.is_some() || turns.iter().any(|turn| !turn.message.fields.is_empty()) {
        bail!("{expected}");
    }
    let system = turns.split_first().filter(|(first, _)| first.message.role == "system");
    if let Some((_, rest)) = system {
        turns = rest;
    }
    let mut pairs = Vec::new();
    for pair in turns.chunks(2) {
        match pair {
            [question, answer]
                if question.message.role == "user" && answer.message.role == "assistant" && answer.learned =>
            {
                pairs.push((question.message.text().to_owned(), answer.message.text().to_owned()));
            }
            _ => bail!("{expected}"),
        }
    }
    let (mut instruction, output) = pairs.pop().context("expected an answer, found none")?;
    let input = extra.shift_remove("input").and_then(|input| input.as_str().map(str::to_owned)).unwrap_or_default();
    if !input.is_empty() {
        let plain = instruction.strip_suffix(&input).context("`input`: expected the end of the question")?;
        instruction = plain.strip_suffix('\n').unwrap_or(plain).to_owned();
    }
    let mut columns = object([("instruction", instruction.into()), ("input", input.into()), ("output", output.into())]);
    if let Some((system, _)) = system {
        columns.insert("system".to_owned(), system.message.text().into());
    }
    if !pairs.is_empty() {
        columns.insert(
            "history".to_owned(),
            pairs.into_iter().map(|(question, answer)| json!([question, answer])).collect(),
        );
    }
    Ok(columns)
}

/// Returns the turns as a list of objects with these keys.
fn turns(
    conversation: &Conversation,
    column: &str,
    [role, text]: [&str; 2],
    name: &dyn for<'a> Fn(&'a str) -> Option<&'a str>,
) -> Result<Map<String, Value>> {
    let mut list = Vec::new();
    for turn in &conversation.turns {
        let message = &turn.message;
        let known =
            name(&message.role).with_context(|| format!("the role `{}` has no name in this format", message.role))?;
        let mut object = object([(role, known.into())]);
        if let Some(content) = &message.content {
            object.insert(text.to_owned(), content.as_str().into());
        }
        object.extend(message.fields.clone());
        if !turn.learned && message.role == "assistant" {
            object.insert("weight".to_owned(), 0.into());
        }
        list.push(Value::Object(object));
    }
    let mut columns = object([(column, list.into())]);
    if let Some(tools) = &conversation.tools {
        columns.insert("tools".to_owned(), tools.clone());
    }
    Ok(columns)
}

fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
