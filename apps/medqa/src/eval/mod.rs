//! Measuring a model.

mod pubmedqa;
mod qa_loss;
mod score;

pub use qa_loss::loss;

use crate::{
    backend::on,
    cli::{EvalArgs, Task},
    data::{Format, Row, Schema, read},
    model, write,
};
use anyhow::{Context, Result};
use burn_llama::kernel::Kernels;
use serde_json::Value;

/// The verb `eval`: the figures on stdout, everything in `--out`.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let schema = match args.task {
        Task::QaLoss => args.rows.schema()?,
        Task::Pubmedqa => Schema { format: Format::PubMedQa, ..Schema::default() },
    };
    let mut rows = read(&args.data, &schema)?;
    rows.truncate(args.limit.map_or(usize::MAX, usize::from));
    let result = on!(args.device.device.ready()?, |B, place| measure::<B>(args, place, &rows))?;
    if let Some(path) = &args.out {
        write::whole(path, format!("{result:#}\n").as_bytes())?;
    }
    let mut short = result;
    if let Some(fields) = short.as_object_mut() {
        fields.remove("items");
    }
    println!("{short}");
    Ok(())
}

fn measure<B: Kernels>(args: &EvalArgs, device: &B::Device, rows: &[Row]) -> Result<Value> {
    let loaded = model::load::<B>(&args.model, args.weights, device)?;
    let result = match args.task {
        Task::QaLoss => qa_loss::measure(&loaded, rows, args),
        Task::Pubmedqa => pubmedqa::measure(&loaded, rows, args),
    };
    result.with_context(|| args.data.display().to_string())
}
