//! Measuring a model.

mod neutral;
mod pubmedqa;
mod qa_loss;
mod score;

pub use qa_loss::loss;

use crate::{
    backend::on,
    cli::{EvalArgs, Task},
    data::{Format, Row, Schema, read},
    model::{self, Loaded},
    write,
};
use anyhow::{Context, Result};
use burn_llama::kernel::Kernels;
use serde_json::{Map, Value, json};

/// The verb `eval`: the figures on stdout, everything in `--out`.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let schema = match args.task {
        Task::QaLoss => args.rows.schema()?,
        Task::Pubmedqa => Schema { format: Format::PubMedQa, ..Schema::default() },
    };
    let mut rows = read(&args.data, &schema)?;
    rows.truncate(args.limit.map_or(usize::MAX, usize::from));
    let mut result = on!(args.device.device.ready()?, |B, place| measure::<B>(args, place, &rows))?;
    if let Some(path) = &args.out {
        write::whole(path, format!("{result:#}\n").as_bytes())?;
    }
    shorten(&mut result);
    println!("{result}");
    Ok(())
}

/// Takes away the items, of which there may be many.
fn shorten(result: &mut Value) {
    if let Some(fields) = result.as_object_mut() {
        fields.remove("items");
        fields.values_mut().for_each(shorten);
    }
}

/// With several adapters, a table of them and of the model without any; else the figures of what was asked for. Either way with
/// the loss on a neutral text, before and after.
fn measure<B: Kernels>(args: &EvalArgs, device: &B::Device, rows: &[Row]) -> Result<Value> {
    let mut loaded = model::without_adapters::<B>(&args.model, args.weights.weights, device)?;
    loaded.model = model::computing(loaded.model, args.weights.compute)?;
    let (before, tokens) = neutral::neutral(&loaded)?;
    let several = args.model.adapter.len() > 1;
    let base = (several || args.model.adapter.is_empty()).then(|| task(&loaded, rows, args)).transpose()?;
    model::add_adapters(&mut loaded.model, &args.model)?;
    let mut found = Vec::new();
    for source in &args.model.adapter {
        burn_peft::adapter::activate(&mut loaded.model, &[&source.name])?;
        let after = neutral::neutral(&loaded)?.0;
        let neutral = json!({ "tokens": tokens, "base": before, "adapter": after, "rise": after - before });
        found.push((source.name.clone(), with(task(&loaded, rows, args)?, neutral)));
    }
    let neutral = json!({ "tokens": tokens, "base": before });
    match (base.map(|base| with(base, neutral)), found.pop()) {
        (Some(base), None) => Ok(base),
        (None, Some((_, only))) => Ok(only),
        (base, last) => {
            let base = base.unwrap_or_default();
            found.extend(last);
            table(&base, &found);
            let adapters: Map<String, Value> = found.into_iter().collect();
            Ok(json!({ "task": base["task"], "base": base, "adapters": adapters }))
        }
    }
}

fn with(mut result: Value, neutral: Value) -> Value {
    result["neutral_loss"] = neutral;
    result
}

fn task<B: Kernels>(loaded: &Loaded<B>, rows: &[Row], args: &EvalArgs) -> Result<Value> {
    let result = match args.task {
        Task::QaLoss => qa_loss::measure(loaded, rows, args),
        Task::Pubmedqa => pubmedqa::measure(loaded, rows, args),
    };
    result.with_context(|| args.data.display().to_string())
}

/// One line for the model without adapters and one for each of them.
fn table(base: &Value, adapters: &[(String, Value)]) {
    let columns: &[&str] = if base["task"] == "qa-loss" { &["loss", "perplexity"] } else { &["accuracy", "macro_f1"] };
    let line = |name: &str, result: &Value, neutral: &str| {
        let figures = columns.iter().map(|column| result[column].as_f64());
        let figures = figures.chain([result["neutral_loss"][neutral].as_f64()]);
        let figures: Vec<String> = figures.map(|figure| format!("{:>12.4}", figure.unwrap_or(f64::NAN))).collect();
        println!("{name:<24}{}", figures.concat());
    };
    let heads: Vec<String> = columns.iter().chain(&["neutral loss"]).map(|head| format!("{head:>12}")).collect();
    println!("{:<24}{}", "", heads.concat());
    line("base", base, "base");
    adapters.iter().for_each(|(name, result)| line(name, result, "adapter"));
}
