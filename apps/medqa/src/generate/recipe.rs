//! The recipe of a generation: one TOML file, overridden by the command line.
//!
//! The secret key of an API is no part of it: the recipe names the environment variable that holds the key.

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

use crate::{fetch, schema::Format};

/// Language of the prompts and of the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Language {
    /// English
    #[default]
    En,
    /// Chinese
    Zh,
}

impl Language {
    /// Returns the name in recipes and file names.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::En => "en",
            Self::Zh => "zh",
        }
    }
}

/// The structure that an API is asked to give its answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ResponseFormat {
    /// A JSON schema, strict.
    #[default]
    JsonSchema,
    /// Any JSON object.
    JsonObject,
    /// Nothing is asked; the prompt alone describes the answer.
    None,
}

/// A generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct GenerateRecipe {
    /// Seed of every random choice.
    pub seed: u64,
    /// Language of the prompts.
    pub language: Language,
    /// File that the method starts from.
    pub input: Option<PathBuf>,
    /// Format of the rows in that file.
    pub format: Format,
    /// The model, and the server that runs it.
    pub api: ApiConfig,
    /// The sampling of answers.
    pub sampling: SamplingConfig,
    /// Hard limits of the whole generation, over all its runs.
    pub budget: BudgetConfig,
    /// Options of the method.
    pub method: MethodOptions,
}

impl Default for GenerateRecipe {
    fn default() -> Self {
        Self {
            seed: 42,
            language: Language::default(),
            input: None,
            format: Format::default(),
            api: ApiConfig::default(),
            sampling: SamplingConfig::default(),
            budget: BudgetConfig::default(),
            method: MethodOptions::default(),
        }
    }
}

/// The model, and the server that runs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ApiConfig {
    /// Base URL of an OpenAI-compatible API, such as `https://api.openai.com/v1`; without it, the model runs in this
    /// process.
    pub base_url: Option<String>,
    /// Name of the model; of a local one, as for `chat`.
    pub model: String,
    /// Environment variable that holds the API key.
    pub api_key_env: String,
    /// Longest time of one request, in seconds.
    pub timeout_seconds: f64,
    /// Attempts for one request, before its row is given up.
    pub max_attempts: u32,
    /// Structure that is asked of the answers of methods that need JSON.
    pub response_format: ResponseFormat,
    /// Name of the field that limits the answer: `max_tokens`, or `max_completion_tokens` for OpenAI's newer models.
    pub max_tokens_field: String,
    /// Prices of the tokens.
    pub price: Option<Price>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            base_url: None,
            model: fetch::SMOLLM2.to_owned(),
            api_key_env: "OPENAI_API_KEY".to_owned(),
            timeout_seconds: 600.0,
            max_attempts: 8,
            response_format: ResponseFormat::default(),
            max_tokens_field: "max_tokens".to_owned(),
            price: None,
        }
    }
}

/// Prices per million tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Price {
    /// Tokens of prompts.
    pub input: f64,
    /// Tokens of answers.
    pub output: f64,
    /// Tokens of prompts that the server had cached; by default as `input`.
    pub cached: Option<f64>,
    /// Name of the currency, for reports.
    #[serde(default)]
    pub currency: String,
}

/// The sampling of answers; keys that are left out have the method's values.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SamplingConfig {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// Longest answer in tokens.
    pub max_tokens: Option<u64>,
}

/// Hard limits of a generation, over all its runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct BudgetConfig {
    /// Tokens of prompts and answers.
    pub tokens: Option<u64>,
    /// Money, in the currency of `api.price`.
    pub money: Option<f64>,
    /// Distinct requests; a request that is sent again after an error is no new one.
    pub requests: Option<u64>,
}

/// Options of the methods. Each method has some of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct MethodOptions {
    /// `magpie`: system line that names the field of the questions.
    pub system: Option<String>,
    /// `passages`: longest passage in characters.
    pub chunk_characters: Option<usize>,
    /// `self-chat`: turns of a dialogue; `evolve`: rewrites of an instruction.
    pub rounds: Option<u32>,
    /// `rejection`: answers to each question.
    pub samples: Option<u32>,
    /// `rejection`: lowest score of the answer that is kept, from 1 to 10.
    pub threshold: Option<f64>,
}

impl GenerateRecipe {
    /// Reads a recipe file, if there is one, overridden by `sets` of the form `table.key=value`.
    ///
    /// # Errors
    /// One line that names the file, the line or the key.
    pub(super) fn load(file: Option<&Path>, sets: &[String]) -> Result<Self> {
        let mut table = match file {
            Some(path) => parse(path)?,
            None => Table::new(),
        };
        for set in sets {
            apply(&mut table, set)?;
        }
        let origin = file.map_or_else(|| "--set".to_owned(), |path| path.display().to_string());
        let recipe: Self = table.try_into().map_err(|error: toml::de::Error| explain(&origin, &error))?;
        recipe.check().map_err(|problem| anyhow!("{origin}: {problem}"))?;
        Ok(recipe)
    }

    /// Checks the values.
    fn check(&self) -> Result<(), String> {
        let api = &self.api;
        if !(api.timeout_seconds > 0.0 && api.timeout_seconds <= 86_400.0) {
            let found = api.timeout_seconds;
            return Err(format!("`api.timeout_seconds`: expected seconds above 0 and up to 86400, found {found}"));
        }
        let name = &api.api_key_env;
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name {
            // A key that stands here by mistake is not repeated.
            return Err(
                "`api.api_key_env`: expected the name of an environment variable, found another text".to_owned()
            );
        }
        if api.max_attempts == 0 {
            return Err("`api.max_attempts`: expected at least 1, found 0".to_owned());
        }
        if !["max_tokens", "max_completion_tokens"].contains(&api.max_tokens_field.as_str()) {
            let found = &api.max_tokens_field;
            return Err(format!(
                "`api.max_tokens_field`: expected max_tokens or max_completion_tokens, found {found:?}"
            ));
        }
        if self.budget.money.is_some() && api.price.is_none() {
            return Err(
                "`budget.money`: expected prices per million tokens in `[api.price]` (input, output), found none"
                    .to_owned(),
            );
        }
        let negative = api.price.as_ref().is_some_and(|price| {
            [Some(price.input), Some(price.output), price.cached]
                .into_iter()
                .flatten()
                .any(|p| !(p >= 0.0 && p.is_finite()))
        });
        if negative {
            return Err("`api.price`: expected numbers of at least 0".to_owned());
        }
        let ranges = [
            ("sampling.temperature", self.sampling.temperature, 0.0, 5.0),
            ("sampling.top_p", self.sampling.top_p, f64::MIN_POSITIVE, 1.0),
            ("budget.money", self.budget.money, 0.0, f64::MAX),
            ("method.threshold", self.method.threshold, 1.0, 10.0),
        ];
        for (key, value, least, most) in ranges {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                return Err(format!("`{key}`: expected a number from {least} to {most}, found {value}"));
            }
        }
        let counts = [
            ("sampling.max_tokens", self.sampling.max_tokens),
            ("method.chunk_characters", self.method.chunk_characters.map(|n| n as u64)),
            ("method.rounds", self.method.rounds.map(u64::from)),
            ("method.samples", self.method.samples.map(u64::from)),
        ];
        match counts.into_iter().find(|(_, value)| *value == Some(0)) {
            Some((key, _)) => Err(format!("`{key}`: expected at least 1, found 0")),
            None => Ok(()),
        }
    }

    /// Returns the options of the method that are set, by name.
    pub(super) fn set_options(&self) -> Vec<String> {
        let table = Table::try_from(&self.method).unwrap_or_default();
        table.keys().cloned().collect()
    }

    /// Returns the SHA-256 of everything that determines the requests, for the rows' provenance. Limits, prices and the
    /// server's address are no part of it.
    pub(super) fn fingerprint(&self, method: &str, input: &[u8]) -> String {
        let parts = serde_json::json!([
            method,
            self.seed,
            self.language,
            self.api.model,
            self.sampling,
            self.method,
            hex(&Sha256::digest(input)),
        ]);
        hex(&Sha256::digest(parts.to_string()))
    }

    /// Returns the recipe as TOML.
    pub(super) fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("the recipe cannot be written as TOML")
    }
}

/// Returns bytes as hexadecimal digits in lower case.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, message) = (before.matches('\n').count() + 1, error.message().replace('\n', ", "));
        anyhow!("{}:{line}: not valid TOML: {message}", path.display())
    })
}

/// Turns an error of a key into one line. The line of the file is not repeated, because it could hold a secret.
fn explain(origin: &str, error: &toml::de::Error) -> anyhow::Error {
    let message = error.message().replace('\n', ", ");
    if message.contains("unknown field `api_key`") {
        return anyhow!(
            "{origin}: an API key does not belong into a recipe; put it into an environment variable and name that: \
             api_key_env = \"OPENAI_API_KEY\""
        );
    }
    anyhow!("{origin}: {message}")
}

/// Overrides one key by `key=value` or `table.key=value`. The value is TOML, or else a string.
fn apply(table: &mut Table, set: &str) -> Result<()> {
    let Some((path, text)) = set.split_once('=') else {
        bail!("--set {set}: expected table.key=value, such as sampling.temperature=0.7");
    };
    let text = text.trim();
    let parsed = format!("value = {text}").parse::<Table>().ok().filter(|parsed| parsed.len() == 1);
    let value = parsed.and_then(|mut parsed| parsed.remove("value")).unwrap_or_else(|| Value::String(text.to_owned()));
    let mut place = table;
    let mut parts = path.trim().split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            place.insert(part.to_owned(), value);
            return Ok(());
        }
        let inner = place.entry(part).or_insert_with(|| Value::Table(Table::new()));
        place = inner.as_table_mut().with_context(|| format!("--set {set}: `{part}` is no table"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(sets: &[&str]) -> Result<GenerateRecipe> {
        GenerateRecipe::load(None, &sets.iter().map(|&set| set.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn keys_are_read_and_mistakes_are_named() {
        let recipe = load(&["seed=7", "api.price.input=0.15", "api.price.output=0.6", "budget.money=1", "language=zh"]);
        let recipe = recipe.unwrap();
        assert_eq!((recipe.seed, recipe.language, recipe.budget.money), (7, Language::Zh, Some(1.0)));
        for (set, words) in [
            ("sede=7", "unknown field `sede`"),
            ("seed=x", "invalid type"),
            ("seed", "table.key=value"),
            ("budget.money=1", "`[api.price]`"),
            ("sampling.top_p=0", "`sampling.top_p`"),
            ("api.timeout_seconds=0", "`api.timeout_seconds`"),
            ("method.samples=0", "`method.samples`"),
            ("seed.a.b=1", "seed"),
        ] {
            let sets = if set.starts_with("seed.a") { vec!["seed=1", set] } else { vec![set] };
            let error = format!("{:#}", load(&sets).unwrap_err());
            assert!(error.contains(words), "{set}: {error}");
        }
    }

    #[test]
    fn a_key_in_a_recipe_is_refused_and_not_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.toml");
        std::fs::write(&path, "[api]\napi_key = \"sk-secret\"\n").unwrap();
        let error = format!("{:#}", GenerateRecipe::load(Some(&path), &[]).unwrap_err());
        assert!(error.contains("api_key_env") && !error.contains("sk-secret"), "{error}");
    }

    #[test]
    fn the_fingerprint_ignores_limits_and_addresses() {
        let one = load(&[]).unwrap();
        let other = load(&["budget.tokens=5", "api.base_url=http://x"]).unwrap();
        assert_eq!(one.fingerprint("m", b"x"), other.fingerprint("m", b"x"));
        assert_ne!(one.fingerprint("m", b"x"), load(&["seed=1"]).unwrap().fingerprint("m", b"x"));
        assert_ne!(one.fingerprint("m", b"x"), one.fingerprint("m", b"y"));
    }
}
