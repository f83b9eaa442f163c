//! The plan of a generation: its method with the input, built once from the recipe.

use super::{
    filters::FilterRules,
    input::{MethodInput, SourceRow},
    method::{Evolve, GraphQuestions, Magpie, Method, Passages, Refusals, Rejection, SeedTask, SelfChat, SelfInstruct},
    output::RowSource,
    recipe::GenerateRecipe,
};
use crate::{args::ModelArgs, model};
use anyhow::{Context, Result, bail};

/// A method of generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MethodName {
    /// A model writes new tasks after three examples, as Alpaca did; --input has the seed tasks
    SelfInstruct,
    /// Questions about passages of a text, with answers that the passage supports; --input has the text
    Passages,
    /// Questions about the entities of a knowledge graph, with answers from their records, as Huatuo did; --graph is
    /// `cmekg`, which is fetched, or a file of JSON, {entity: {predicate: [value]}}
    KnowledgeGraph,
    /// A chat model writes the question after its own template, and then the answer; a local model, without input
    Magpie,
    /// A whole dialogue about each question of --input, as Baize did
    SelfChat,
    /// Each instruction of --input is rewritten to be harder, deeper or rarer, and then answered (Evol-Instruct)
    Evolve,
    /// Several answers to each question of --input, of which a judge keeps the best; also writes pairs of preferences
    Rejection,
    /// Requests to refuse and emergencies, each kind with its opposite; without input
    Refusals,
}

/// The facts of a method that do not depend on the recipe.
struct MethodFacts {
    name: &'static str,
    /// Number of the prompts' version; it stands in every row.
    prompt_version: u32,
    /// Format of the rows, for the note after the run.
    format: &'static str,
    needs_input: bool,
    /// Keys of `[method]` that the method has.
    options: &'static [&'static str],
}

impl MethodName {
    fn facts(self) -> MethodFacts {
        let facts =
            |name, format, needs_input, options| MethodFacts { name, prompt_version: 1, format, needs_input, options };
        match self {
            Self::SelfInstruct => facts("self-instruct", "alpaca", true, &[]),
            Self::Passages => facts("passages", "qa", true, &["chunk_characters"]),
            Self::KnowledgeGraph => facts("knowledge-graph", "qa", true, &[]),
            Self::Magpie => facts("magpie", "qa", false, &["system"]),
            Self::SelfChat => facts("self-chat", "messages", true, &["rounds"]),
            Self::Evolve => facts("evolve", "qa", true, &["rounds"]),
            Self::Rejection => facts("rejection", "qa", true, &["samples", "threshold"]),
            Self::Refusals => facts("refusals", "qa", false, &[]),
        }
    }
}

/// A generation that is ready to run.
pub(super) struct GenerationPlan {
    pub method: Box<dyn Method>,
    pub rules: FilterRules,
    pub source: RowSource,
    /// Format of the rows.
    pub format: &'static str,
}

impl GenerationPlan {
    /// Builds the method of a recipe.
    ///
    /// # Errors
    /// If the recipe has keys that the method has not, or the input is missing, unreadable or has numbers of people and
    /// `allow_personal` is false.
    pub(super) fn new(
        name: MethodName,
        recipe: &GenerateRecipe,
        model: &ModelArgs,
        allow_personal: bool,
    ) -> Result<Self> {
        let facts = name.facts();
        if let Some(key) = recipe.set_options().into_iter().find(|key| !facts.options.contains(&key.as_str())) {
            let known = if facts.options.is_empty() { "none".to_owned() } else { facts.options.join(", ") };
            bail!("`method.{key}`: {} has no such key; it has {known}", facts.name);
        }
        match (&recipe.input, facts.needs_input) {
            (None, true) => bail!("{}: expected a file to start from: --input FILE", facts.name),
            (Some(path), false) => bail!("{}: expected no input, found {}", facts.name, path.display()),
            _ => {}
        }
        let input = match name {
            MethodName::KnowledgeGraph => MethodInput::read_graph(recipe)?,
            _ => MethodInput::read(recipe)?,
        };
        if let Some(path) = recipe.input.as_ref().filter(|_| !allow_personal) {
            input.check_personal(path)?;
        }
        let fingerprint = recipe.fingerprint(facts.name, &input.bytes);
        let method = build(name, recipe, model, input)?;
        let source = RowSource {
            method: facts.name,
            prompt_version: facts.prompt_version,
            recipe: fingerprint,
            model: recipe.api.model.clone(),
        };
        Ok(Self { rules: method.rules(), method, source, format: facts.format })
    }
}

fn build(name: MethodName, recipe: &GenerateRecipe, model: &ModelArgs, input: MethodInput) -> Result<Box<dyn Method>> {
    let (seed, language, options) = (recipe.seed, recipe.language, &recipe.method);
    Ok(match name {
        MethodName::SelfInstruct => {
            let task =
                |row: SourceRow| SeedTask { instruction: row.question, input: String::new(), output: row.answer };
            Box::new(SelfInstruct { seed, language, tasks: input.rows.into_iter().map(task).collect() })
        }
        MethodName::Passages => Box::new(Passages::new(language, &input.rows, options.chunk_characters)),
        MethodName::KnowledgeGraph => Box::new(GraphQuestions::new(input.graph, language, seed)),
        MethodName::SelfChat => Box::new(SelfChat { language, questions: input.rows, rounds: options.rounds }),
        MethodName::Evolve => Box::new(Evolve { seed, language, instructions: input.rows, rounds: options.rounds }),
        MethodName::Rejection => Box::new(Rejection {
            language,
            questions: input.rows,
            samples: options.samples,
            threshold: options.threshold,
        }),
        MethodName::Refusals => Box::new(Refusals { seed, language }),
        MethodName::Magpie => {
            if recipe.api.base_url.is_some() {
                bail!(
                    "magpie continues the raw text of a chat template, which chat APIs do not offer: leave out \
                     `api.base_url` and name a local model"
                );
            }
            let tokenizer = model::load_tokenizer(model).context("magpie needs the model's chat template")?;
            Box::new(Magpie::new(&tokenizer, language, options.system.as_deref())?)
        }
    })
}
