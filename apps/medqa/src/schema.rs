//! Layout of a data file: its format and the names of its columns.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, str::FromStr};

/// Format of the rows of a data file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Keys `question` and `answer`
    #[default]
    Qa,
    /// PubMedQA's official JSON file
    #[value(name = "pubmedqa")]
    PubMedQa,
    /// Alpaca: keys `instruction`, `input` and `output`; optionally `system` and `history`
    Alpaca,
    /// OpenAI conversations: key `messages`, a list of objects with `role` and `content`
    Messages,
    /// ShareGPT conversations: key `conversations`, a list of objects with `from` and `value`; optionally `system`
    #[value(name = "sharegpt")]
    ShareGpt,
    /// TRL: keys `prompt` and `completion`, each a text or a list of messages
    #[serde(rename = "prompt-completion")]
    PromptCompletion,
    /// Multiple choice: keys `question`, `options` and `answer`, or those of MedMCQA, MedQA, CMB, CMExam or MMLU
    #[serde(rename = "multiple-choice")]
    MultipleChoice,
    /// Plain text, all of which is learned: key `text`, or the paragraphs of a .txt file
    Text,
}

impl Format {
    /// Returns the columns of the format that can be renamed.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Qa => &["question", "answer"],
            Self::PubMedQa => &[],
            Self::Alpaca => &["instruction", "input", "output", "system", "history"],
            Self::Messages => &["messages", "role", "content"],
            Self::ShareGpt => &["conversations", "from", "value", "system"],
            Self::PromptCompletion => &["prompt", "completion", "role", "content"],
            Self::MultipleChoice => &["question", "options", "answer"],
            Self::Text => &["text"],
        }
    }

    /// Returns the columns of the format that hold a list, which text files such as CSV write as JSON.
    pub fn list_columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::ShareGpt => &["conversations"],
            Self::Alpaca => &["history"],
            Self::PubMedQa => &["CONTEXTS"],
            Self::Qa | Self::PromptCompletion | Self::MultipleChoice | Self::Text => &[],
        }
    }

    /// Returns the name of the format, as a recipe and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qa => "qa",
            Self::PubMedQa => "pubmedqa",
            Self::Alpaca => "alpaca",
            Self::Messages => "messages",
            Self::ShareGpt => "sharegpt",
            Self::PromptCompletion => "prompt-completion",
            Self::MultipleChoice => "multiple-choice",
            Self::Text => "text",
        }
    }
}

/// Renamed columns: the format's name → the name in the file. Columns that are not listed have the format's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Columns(BTreeMap<String, String>);

impl Columns {
    /// Returns the name of a column in the file.
    pub fn name<'a>(&'a self, column: &'a str) -> &'a str {
        self.0.get(column).map_or(column, String::as_str)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks that `format` has every renamed column; the error is a message without the name of the option or key.
    pub fn check(&self, format: Format) -> Result<(), String> {
        let known = format.columns();
        let Some(column) = self.0.keys().find(|column| !known.contains(&column.as_str())) else { return Ok(()) };
        if known.is_empty() {
            return Err(format!("expected none, as this format's columns have fixed names, found `{column}`"));
        }
        Err(format!("expected columns among {}, found `{column}`", known.join(", ")))
    }
}

impl FromStr for Columns {
    type Err = String;

    /// Parses pairs such as `question=prompt,answer=response`.
    fn from_str(text: &str) -> Result<Self, String> {
        let pair = |pair: &str| match pair.split_once('=') {
            Some((column, name)) if !column.trim().is_empty() && !name.trim().is_empty() => {
                Ok((column.trim().to_owned(), name.trim().to_owned()))
            }
            _ => Err(format!("expected COLUMN=NAME pairs such as question=prompt,answer=response, found {pair:?}")),
        };
        text.split(',').map(pair).collect::<Result<_, _>>().map(Self)
    }
}

impl From<&[(&str, &str)]> for Columns {
    fn from(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(column, name)| ((*column).to_owned(), (*name).to_owned())).collect())
    }
}

/// Format and column names of a data file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    pub format: Format,
    pub columns: Columns,
}

/// The format and the column names that a user asks for; without a format, it is recognized by the keys of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SchemaRequest {
    pub format: Option<Format>,
    pub columns: Columns,
}

impl From<Schema> for SchemaRequest {
    fn from(schema: Schema) -> Self {
        Self { format: Some(schema.format), columns: schema.columns }
    }
}

impl SchemaRequest {
    /// Returns the format that is certain before a row is read: the one asked for, or qa for renamed columns.
    pub fn certain(&self) -> Option<Schema> {
        let renamed = (!self.columns.is_empty()).then_some(Format::Qa);
        Some(Schema { format: self.format.or(renamed)?, columns: self.columns.clone() })
    }

    /// Checks that the format has the renamed columns; the error is a message without the name of the option or key.
    pub fn check(&self) -> Result<(), String> {
        self.columns.check(self.format.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_the_command_line_are_pairs_that_the_format_has() {
        let columns: Columns = "question=prompt, answer = response".parse().unwrap();
        assert_eq!((columns.name("question"), columns.name("answer")), ("prompt", "response"));
        assert_eq!(columns.name("input"), "input");
        assert_eq!(columns.check(Format::Qa), Ok(()));
        let problem = columns.check(Format::Alpaca).unwrap_err();
        assert_eq!(problem, "expected columns among instruction, input, output, system, history, found `answer`");
        assert!(columns.check(Format::PubMedQa).unwrap_err().contains("fixed names"));
        for wrong in ["", "question", "question=", "=a", "question=a,,"] {
            assert!(wrong.parse::<Columns>().unwrap_err().contains("COLUMN=NAME"), "{wrong}");
        }
    }
}
