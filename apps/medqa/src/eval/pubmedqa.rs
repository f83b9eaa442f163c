//! PubMedQA by log-likelihood, like the task `pubmedqa` of lm-evaluation-harness.

use super::{
    EvalArgs,
    metrics::{accuracy, macro_f1},
    room,
};
use crate::{
    data::{Row, RowContent, pubmedqa_prompt},
    model::LoadedModel,
};
use anyhow::{Context, Result, bail};
use burn_llama::{Tokenizer, generate, kernel::Kernels};
use serde_json::{Map, Value, json};

const CHOICES: [&str; 3] = ["yes", "no", "maybe"];

pub(super) fn evaluate<B: Kernels>(loaded: &LoadedModel<B>, rows: &[Row], args: &EvalArgs) -> Result<Value> {
    let longest = args.limits.max_length.unwrap_or_else(|| room(loaded));
    let (mut items, mut pairs) = (Map::new(), Vec::new());
    for row in rows {
        let RowContent::PubMedQa { question, contexts, decision } = &row.content else {
            bail!("the task pubmedqa needs rows in PubMedQA's layout");
        };
        let pmid = row.location.place.to_string();
        let gold = decision.as_deref().with_context(|| format!("{pmid}: `final_decision` is missing"))?;
        let scores = choice_log_likelihoods(loaded, &pubmedqa_prompt(question, contexts), longest)?;
        let best = (1..3).fold(0, |best, i| if scores[i] > scores[best] { i } else { best });
        items.insert(pmid, json!({ "prediction": CHOICES[best], "gold": gold, "loglikelihood": scores }));
        pairs.push((CHOICES[best], gold));
    }
    Ok(json!({
        "task": "pubmedqa", "n": pairs.len(), "accuracy": accuracy(&pairs), "macro_f1": macro_f1(&pairs), "items": items,
    }))
}

/// Returns the log-likelihood of each choice after the context. Both are encoded together and then split, as in the
/// harness.
fn choice_log_likelihoods<B: Kernels>(loaded: &LoadedModel<B>, context: &str, longest: usize) -> Result<Vec<f64>> {
    let context_ids = loaded.tokenizer.encode_plain(context, true)?;
    let choices = CHOICES.map(|choice| encode_choice(&loaded.tokenizer, context, choice, context_ids.len()));
    let choices = choices.into_iter().collect::<Result<Vec<_>>>()?;
    let room = choices.iter().map(|(_, ids)| ids.len()).max().unwrap_or(1);
    let cut = |ids: &[u32]| ids[(ids.len() + room).saturating_sub(longest).min(ids.len() - 1)..].to_vec();
    if choices.iter().all(|(before, _)| *before == context_ids) {
        let continuations: Vec<Vec<u32>> = choices.into_iter().map(|(_, ids)| ids).collect();
        return Ok(generate::log_likelihoods(&loaded.model, &cut(&context_ids), &continuations)?);
    }
    // If the tokenizer merges across the boundary, each choice has a context of its own.
    let mut scores = Vec::new();
    for (before, ids) in choices {
        scores.extend(generate::log_likelihoods(&loaded.model, &cut(&before), &[ids])?);
    }
    Ok(scores)
}

fn encode_choice(tokenizer: &Tokenizer, context: &str, choice: &str, at: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let mut whole = tokenizer.encode_plain(&format!("{context} {choice}"), true)?;
    if at == 0 || whole.len() <= at {
        bail!("the tokenizer leaves no token for the choice `{choice}`");
    }
    let ids = whole.split_off(at);
    Ok((whole, ids))
}
