//! Talking to a model.

use crate::{
    backend::on,
    cli::ChatArgs,
    model::{self, Loaded, conversation},
};
use anyhow::Result;
use burn_llama::{Generate, Message, Settings, kernel::Kernels};
use burn_peft::{adapter, route::BASE};
use rustyline::{DefaultEditor, error::ReadlineError};
use std::io::{IsTerminal, Write};

/// The verb `chat`: one answer, or a conversation.
pub fn chat(args: &ChatArgs) -> Result<()> {
    on!(args.device.device.ready()?, |B, place| talk::<B>(args, place))
}

fn talk<B: Kernels>(args: &ChatArgs, device: &B::Device) -> Result<()> {
    let mut loaded = model::without_adapters::<B>(&args.model, args.weights.weights, device)?;
    loaded.model = model::computing(loaded.model, args.weights.compute)?;
    model::add_adapters(&mut loaded.model, &args.model)?;
    let settings = settings(args, loaded.tokenizer.eos_ids());
    settings.check()?;
    let mut history = Vec::new();
    if let Some(prompt) = &args.prompt {
        history.push(Message::new("user", prompt.as_str()));
        answer(&loaded, &history, &settings, &args.stop)?;
        return Ok(());
    }
    let switching = if args.model.adapter.is_empty() { "" } else { "/adapter NAME switches the adapter, " };
    eprintln!("Ask a question; {switching}/new forgets the conversation, /quit or Ctrl-D ends it.");
    let mut editor = DefaultEditor::new()?;
    // What comes through a pipe must not find prompts among the answers, not even where TERM=dumb.
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
            "/adapter" => switch(&mut loaded, ""),
            command if command.starts_with("/adapter ") => switch(&mut loaded, command["/adapter".len()..].trim()),
            question => {
                editor.add_history_entry(question)?;
                history.push(Message::new("user", question));
                let text = answer(&loaded, &history, &settings, &args.stop)?;
                history.push(Message::new("assistant", text));
            }
        }
    }
}

fn settings(args: &ChatArgs, eos: &[u32]) -> Settings {
    Settings {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        eos: eos.to_vec(),
    }
}

/// Lets the named adapter act alone; `base` lets none. Without a name, says which there are.
fn switch<B: Kernels>(loaded: &mut Loaded<B>, name: &str) {
    let model = &mut loaded.model;
    let switched = match name {
        "" => Ok(()),
        "base" | BASE => adapter::activate(model, &[]),
        name => adapter::activate(model, &[name]),
    };
    if let Err(error) = switched {
        // A name that is not there must not end the conversation.
        eprintln!("{error}");
    }
    let active = adapter::active(model);
    let mark = |name: String| if active.contains(&name) { format!("[{name}]") } else { name };
    let base = if active.is_empty() { "[base]" } else { "base" };
    let names = adapter::names(model).into_iter().map(mark);
    eprintln!("adapters: {}", std::iter::once(base.to_owned()).chain(names).collect::<Vec<_>>().join(" "));
}

/// Streams the assistant's next words to stdout and returns them.
fn answer<B: Kernels>(loaded: &Loaded<B>, history: &[Message], settings: &Settings, stop: &[String]) -> Result<String> {
    let prompt = conversation(&loaded.tokenizer, history)?;
    let mut generate = Generate::new(&loaded.model, &[prompt], settings)?;
    let (mut stream, mut text, mut shown) = (loaded.tokenizer.stream(), String::new(), 0);
    // Text that may yet become a stop string is held back.
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
