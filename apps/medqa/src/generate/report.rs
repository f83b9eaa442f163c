//! The estimate before a generation and the report after it.

use super::{
    answer::TokenUsage,
    budget::Budget,
    counts::GenerationCounts,
    engine::StopReason,
    journal::Journal,
    method::{ExpectedSize, Method},
    recipe::GenerateRecipe,
    request::ModelRequest,
};
use serde_json::{Value, json};
use std::fmt::Write;

/// The size of a generation before it runs.
pub(super) struct SizeEstimate {
    items: u64,
    requests: u64,
    expected: TokenUsage,
    most: TokenUsage,
}

impl SizeEstimate {
    /// Estimates the requests and tokens for `items` items from their first requests, and from the answers of earlier
    /// runs if there are some.
    pub(super) fn new(method: &dyn Method, items: u64, first: &[ModelRequest], earlier: Option<TokenUsage>) -> Self {
        let ExpectedSize { requests, answer_tokens, .. } = method.expected_size();
        let requests = (items as f64 * requests).ceil();
        let mean = |total: u64| total as f64 / first.len().max(1) as f64;
        let prompt = mean(first.iter().map(ModelRequest::prompt_tokens).sum());
        let longest = mean(first.iter().map(ModelRequest::max_tokens).sum());
        let usual = answer_tokens.min(longest);
        // The reservation for a prompt is an upper bound; usually it takes three quarters of that.
        let usual = earlier.map_or((prompt * 0.75, usual), |e| (e.prompt_tokens as f64, e.completion_tokens as f64));
        let total = |prompt: f64, answer: f64| TokenUsage {
            prompt_tokens: (requests * prompt) as u64,
            completion_tokens: (requests * answer) as u64,
            cached_tokens: 0,
        };
        let (expected, most) = (total(usual.0, usual.1), total(prompt, longest));
        Self { items, requests: requests as u64, expected, most }
    }

    /// Describes the estimate.
    pub(super) fn text(&self, budget: &Budget, recipe: &GenerateRecipe) -> String {
        let line = |usage: &TokenUsage| {
            let money = recipe.api.price.as_ref();
            let money =
                money.map(|price| format!(", {:.4} {}", budget.money(usage), price.currency).trim_end().to_owned());
            let TokenUsage { prompt_tokens, completion_tokens, .. } = usage;
            format!("{prompt_tokens} tokens in prompts, {completion_tokens} in answers{}", money.unwrap_or_default())
        };
        let mut text = format!("items      {}\nrequests   about {}\n", self.items, self.requests);
        let _ = writeln!(text, "expected   {}", line(&self.expected));
        let _ = writeln!(text, "at most    {}", line(&self.most));
        text += "A token is taken as 4 characters, and at most as 3; of Chinese, as 2, and at most as 1.4. Nothing was sent.";
        if recipe.api.price.is_none() && recipe.api.base_url.is_some() {
            text += "\nWithout prices in `[api.price]`, no money is estimated.";
        }
        text
    }
}

/// Returns the mean tokens of the requests of earlier runs.
pub(super) fn mean_usage(journal: &Journal) -> Option<TokenUsage> {
    let usages: Vec<_> = journal.answers().filter_map(TokenUsage::of).collect();
    let count = usages.len() as u64;
    (count > 0).then(|| TokenUsage {
        prompt_tokens: usages.iter().map(|usage| usage.prompt_tokens).sum::<u64>() / count,
        completion_tokens: usages.iter().map(|usage| usage.completion_tokens).sum::<u64>() / count,
        cached_tokens: 0,
    })
}

/// The figures of a generation.
pub(super) fn figures(
    counts: &GenerationCounts,
    budget: &Budget,
    recipe: &GenerateRecipe,
    stop: Option<&StopReason>,
) -> Value {
    let spent = budget.spent();
    let mut figures = json!({
        "rows": counts.rows,
        "requests": budget.requests(),
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "cached_tokens": spent.cached_tokens,
        "lost_requests": budget.lost,
        "estimated_usage": counts.unknown_usage,
        "retries": counts.retries,
        "failed": counts.failed,
        "removed": counts.removed,
        "repaired": counts.repaired,
        "asked_again": counts.asked_again,
    });
    if let Some(price) = &recipe.api.price {
        figures["money"] = json!((budget.money(&spent) * 1e6).round() / 1e6);
        figures["currency"] = json!(price.currency);
    }
    if let Some(StopReason::Budget(limit)) = stop {
        figures["stopped_at"] = json!(limit);
    }
    figures
}

/// Describes the counts in a table.
pub(super) fn table(counts: &GenerationCounts, budget: &Budget) -> String {
    let mut text = format!("kept {} rows; spent {}\n", counts.rows, budget.describe());
    let mut part = |title: &str, rows: Vec<(&str, u64)>| {
        if rows.is_empty() {
            return;
        }
        let _ = writeln!(text, "{title}");
        for (name, count) in rows {
            let _ = writeln!(text, "  {count:>6}  {name}");
        }
    };
    part("removed", counts.removed.iter().map(|(name, count)| (name.as_str(), *count)).collect());
    part("saved by a repair of the JSON", counts.repaired.iter().map(|(name, count)| (*name, *count)).collect());
    part("asked once more", counts.asked_again.iter().map(|(name, count)| (*name, *count)).collect());
    let others = [("requests that failed", counts.failed), ("attempts repeated", counts.retries)];
    let others = others.into_iter().chain([
        ("requests whose answer an earlier run lost; they count as spent", budget.lost as u64),
        ("requests whose tokens are estimated", counts.unknown_usage),
    ]);
    part("requests", others.filter(|(_, count)| *count > 0).collect());
    text
}
