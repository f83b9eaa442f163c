//! Renders chat templates: `tests/real/templates.py` compares the texts with those of `transformers`.
//!
//! Reads one JSON object on each line of the standard input: `template`, the source of a chat template; `time`, the local
//! time that the template sees; `context`, the variables. Writes `{"text": …}` or `{"error": …}` on a line for each.

use std::io::{BufRead, BufWriter, Write};

use burn_llama::ChatTemplate;
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    for line in std::io::stdin().lock().lines() {
        let case: Value = serde_json::from_str(&line?)?;
        let text = |key: &str| case[key].as_str().ok_or_else(|| format!("a line has no text {key:?}"));
        let (source, time) = (text("template")?, text("time")?);
        let rendered = ChatTemplate::new(source, None, None)
            .and_then(|template| template.with_time(time))
            .and_then(|template| template.render_context(&case["context"]));
        let answer = match rendered {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
