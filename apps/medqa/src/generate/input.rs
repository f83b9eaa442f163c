//! The file that a method starts from.

use super::{graph::KnowledgeGraph, personal, recipe::GenerateRecipe};
use crate::{
    data::{self, RowContent},
    fetch,
    schema::Schema,
};
use anyhow::{Context, Result, bail};
use std::path::Path;

/// One piece of the input.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SourceRow {
    /// Place in the file, for errors and provenance.
    pub place: String,
    pub question: String,
    pub answer: String,
}

/// The input of a generation.
#[derive(Debug, Default)]
pub(super) struct MethodInput {
    pub rows: Vec<SourceRow>,
    /// The graph of `knowledge-graph`; of other methods it is empty.
    pub graph: KnowledgeGraph,
    /// The bytes of the file, for the fingerprint of the recipe.
    pub bytes: Vec<u8>,
}

impl MethodInput {
    /// Reads the file that the recipe names: rows of its format, or one text if the file's name ends in `.txt` or
    /// `.md`.
    ///
    /// # Errors
    /// If the file cannot be read or a row is malformed.
    pub(super) fn read(recipe: &GenerateRecipe) -> Result<Self> {
        let Some(path) = &recipe.input else { return Ok(Self::default()) };
        let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if ["txt", "md"].contains(&extension.to_ascii_lowercase().as_str()) {
            let text = String::from_utf8(bytes.clone());
            let text = text.with_context(|| format!("{}: expected text in UTF-8", path.display()))?;
            let text = text.trim_start_matches('\u{feff}').to_owned();
            let row = SourceRow { place: "text".to_owned(), question: String::new(), answer: text };
            return Ok(Self { rows: vec![row], bytes, ..Self::default() });
        }
        let rows = data::read_rows(path, &Schema { format: recipe.format, ..Schema::default() }.into())?;
        let rows = rows.into_iter().map(|row| {
            let place = row.location.place.to_string();
            let pair = pair(row.content).with_context(|| row.location.to_string())?;
            Ok(SourceRow { place, question: pair.question, answer: pair.answer })
        });
        Ok(Self { rows: rows.collect::<Result<_>>()?, bytes, ..Self::default() })
    }

    /// Reads the graph that the recipe names: `cmekg`, which is fetched, or a file.
    ///
    /// # Errors
    /// If the graph cannot be fetched or read.
    pub(super) fn read_graph(recipe: &GenerateRecipe) -> Result<Self> {
        let path = match &recipe.input {
            Some(path) if path.as_os_str() == "cmekg" => fetch::fetch_cmekg()?,
            path => path.clone().unwrap_or_default(),
        };
        let bytes = std::fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        Ok(Self { graph: KnowledgeGraph::read(&path, &bytes, recipe.seed)?, bytes, ..Self::default() })
    }

    /// Refuses phone and identity numbers.
    ///
    /// # Errors
    /// One line that names the first row with one.
    pub(super) fn check_personal(&self, path: &Path) -> Result<()> {
        self.graph.check_personal(path)?;
        let kinds = self.rows.iter().filter_map(|row| {
            let kind = personal::find(&row.question).or_else(|| personal::find(&row.answer))?;
            Some((row, kind))
        });
        let found: Vec<_> = kinds.collect();
        let Some((row, kind)) = found.first() else { return Ok(()) };
        bail!(
            "{}: {}: {kind} stands in it ({} such rows in all); nothing was sent. Take such numbers out, or say \
             --allow-personal-data if they may leave this machine",
            path.display(),
            row.place,
            found.len()
        )
    }
}

/// A question and its answer.
struct QuestionAndAnswer {
    question: String,
    answer: String,
}

/// Takes the first question and its answer out of a row.
fn pair(content: RowContent) -> Result<QuestionAndAnswer> {
    match content {
        RowContent::Answer { prompt, answer } => {
            let question = prompt.last().map(|message| message.text().to_owned()).unwrap_or_default();
            Ok(QuestionAndAnswer { question, answer })
        }
        RowContent::Conversation(conversation) => {
            let text = |role: &str| {
                let turn = conversation.turns.iter().find(|turn| turn.message.role == role);
                turn.map(|turn| turn.message.text().to_owned())
            };
            let question = text("user").context("expected a turn of the user")?;
            Ok(QuestionAndAnswer { question, answer: text("assistant").unwrap_or_default() })
        }
        RowContent::PubMedQa { question, contexts, .. } => {
            Ok(QuestionAndAnswer { question, answer: contexts.join("\n") })
        }
        RowContent::Text(text) => Ok(QuestionAndAnswer { question: String::new(), answer: text }),
    }
}
