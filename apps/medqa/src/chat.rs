//! The verb `chat`: one answer, or an interactive conversation.

use crate::{
    args::{DeviceArgs, ModelArgs, TemplateArgs, WeightsArgs},
    backend::with_backend,
    model::{self, LoadedModel, apply_chat_template},
};
use anyhow::Result;
use burn_llama::{Generation, GenerationConfig, Message, kernel::Kernels};
use burn_peft::{adapter, route::BASE};
use clap::Args;
use rustyline::{DefaultEditor, error::ReadlineError};
use std::io::{IsTerminal, Write};

/// Arguments of `chat`.
#[derive(Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Answer this one question and exit; without it, an interactive conversation starts
    #[arg(long)]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Generation of an answer.
#[derive(Args)]
pub(crate) struct SamplingArgs {
    /// Maximum number of tokens per answer
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token (greedy decoding), higher values vary more
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample only from this many most likely tokens; 0 means all tokens
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Sample only from the most likely tokens that together have this probability (nucleus sampling)
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Penalty for repetition: values above 1 make tokens that have already occurred less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Random seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End the answer where this text occurs; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
}

/// Runs the verb `chat`.
pub(crate) fn chat(args: &ChatArgs) -> Result<()> {
    with_backend!(args.device.device.ensure_ready()?, |B, device| run_chat::<B>(args, device))
}

fn run_chat<B: Kernels>(args: &ChatArgs, device: &B::Device) -> Result<()> {
    let mut loaded = model::load_without_adapters::<B>(&args.model, args.weights.weights, device)?;
    loaded.tokenizer = args.template.options().apply(loaded.tokenizer)?;
    loaded.model = model::with_compute(loaded.model, args.weights.compute)?;
    model::add_adapters(&mut loaded, &args.model)?;
    let settings = generation_config(&args.sampling, loaded.tokenizer.eos_ids());
    settings.check()?;
    let mut history = Vec::new();
    if let Some(prompt) = &args.prompt {
        history.push(Message::new("user", prompt.as_str()));
        stream_answer(&loaded, &history, &settings, &args.sampling.stop)?;
        return Ok(());
    }
    let switching = if args.model.adapter.is_empty() { "" } else { "/adapter NAME switches the adapter, " };
    eprintln!("Ask a question; {switching}/new forgets the conversation, /quit or Ctrl-D ends it.");
    let mut editor = DefaultEditor::new()?;
    // Output for a pipe must not contain prompts between the answers, not even with TERM=dumb.
    let prompt = if std::io::stdin().is_terminal() { "> " } else { "" };
    loop {
        let line = match editor.readline(prompt) {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(()),
            "/new" => history.clear(),
            "/adapter" => switch_adapter(&mut loaded, ""),
            command if command.starts_with("/adapter ") => {
                switch_adapter(&mut loaded, command["/adapter".len()..].trim())
            }
            question => {
                editor.add_history_entry(question)?;
                history.push(Message::new("user", question));
                match stream_answer(&loaded, &history, &settings, &args.sampling.stop) {
                    Ok(text) => history.push(Message::new("assistant", text)),
                    // A conversation that has become too long must not end the program.
                    Err(error) if matches!(error.downcast_ref(), Some(burn_llama::Error::ContextLength { .. })) => {
                        eprintln!("error: {error:#}; /new forgets the conversation");
                        history.pop();
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

fn generation_config(args: &SamplingArgs, eos: &[u32]) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        eos: eos.to_vec(),
    }
}

/// Activates only the named adapter, or none for `base`, and prints the list of adapters; an empty name only prints it.
fn switch_adapter<B: Kernels>(loaded: &mut LoadedModel<B>, name: &str) {
    let model = &mut loaded.model;
    let switched = match name {
        "" => Ok(()),
        "base" | BASE => adapter::activate(model, &[]),
        name => adapter::activate(model, &[name]),
    };
    if let Err(error) = switched {
        // An unknown name must not end the conversation.
        eprintln!("{error}");
    }
    let active = adapter::active(model);
    let mark = |name: String| if active.contains(&name) { format!("[{name}]") } else { name };
    let base = if active.is_empty() { "[base]" } else { "base" };
    let names = adapter::names(model).into_iter().map(mark);
    eprintln!("adapters: {}", std::iter::once(base.to_owned()).chain(names).collect::<Vec<_>>().join(" "));
}

/// Generates the assistant's answer, streams it to stdout and returns it.
fn stream_answer<B: Kernels>(
    loaded: &LoadedModel<B>,
    history: &[Message],
    settings: &GenerationConfig,
    stop: &[String],
) -> Result<String> {
    let prompt = apply_chat_template(&loaded.tokenizer, history)?;
    let mut generate = Generation::new(&loaded.model, &[prompt], settings)?;
    let (mut stream, mut text, mut shown) = (loaded.tokenizer.stream(), String::new(), 0);
    // Text that may be the beginning of a stop string is held back.
    let held = stop.iter().map(|s| s.len().saturating_sub(1)).max().unwrap_or(0);
    let mut out = std::io::stdout().lock();
    'words: while let Some(ids) = generate.advance()? {
        let Some(piece) = ids.first().copied().flatten().map(|id| stream.push(id)).transpose()?.flatten() else {
            continue;
        };
        text.push_str(&piece);
        if let Some(end) = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| text.find(s.as_str())).min() {
            text.truncate(end);
            break 'words;
        }
        let mut upto = text.len().saturating_sub(held).max(shown);
        while !text.is_char_boundary(upto) {
            upto -= 1;
        }
        if upto > shown {
            write!(out, "{}", &text[shown..upto])?;
            out.flush()?;
            shown = upto;
        }
    }
    if let Some(rest) = stream.finish()?
        && stop.is_empty()
    {
        text.push_str(&rest);
    }
    writeln!(out, "{}", text.get(shown..).unwrap_or_default())?;
    Ok(text)
}
