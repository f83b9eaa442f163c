//! The budget of a generation: it is reserved before a request is sent, and settled when the request has ended.

use super::{
    answer::TokenUsage,
    journal::JournalEntry,
    recipe::{BudgetConfig, Price},
};
use std::collections::{HashMap, HashSet};

/// Spent, reserved and allowed tokens, money and requests.
pub(super) struct Budget {
    limits: BudgetConfig,
    price: Option<Price>,
    spent: TokenUsage,
    /// Requests that are under way, or whose end was lost.
    reserved: HashMap<String, TokenUsage>,
    keys: HashSet<String>,
    /// Reservations of earlier runs whose end was lost with them.
    pub lost: usize,
}

impl Budget {
    /// Creates a budget of which nothing is spent.
    pub(super) fn new(limits: BudgetConfig, price: Option<Price>) -> Self {
        let (spent, reserved) = (TokenUsage::default(), HashMap::new());
        Self { limits, price, spent, reserved, keys: HashSet::new(), lost: 0 }
    }

    /// Counts an entry of the journal.
    pub(super) fn record(&mut self, entry: &JournalEntry) {
        match entry {
            JournalEntry::Sent { key, reserved, .. } => {
                self.keys.insert(key.clone());
                if let Some(earlier) = self.reserved.insert(key.clone(), *reserved) {
                    // The same request was lost and is sent again: the server may have answered both.
                    self.spend(earlier);
                }
            }
            JournalEntry::End(end) => {
                self.keys.insert(end.key.clone());
                self.reserved.remove(&end.key);
                self.spend(end.usage);
            }
            JournalEntry::Format { .. } => {}
        }
    }

    /// Takes the open reservations of earlier runs as spent, because their answers are lost. Called once after the
    /// journal was read.
    pub(super) fn close_lost(&mut self) {
        let lost: Vec<_> = self.reserved.drain().map(|(_, usage)| usage).collect();
        self.lost = lost.len();
        lost.into_iter().for_each(|usage| self.spend(usage));
    }

    fn spend(&mut self, usage: TokenUsage) {
        self.spent.prompt_tokens += usage.prompt_tokens;
        self.spent.completion_tokens += usage.completion_tokens;
        self.spent.cached_tokens += usage.cached_tokens;
    }

    /// Returns the name of the limit that a request would exceed, if there is one.
    pub(super) fn refuses(&self, key: &str, estimate: TokenUsage) -> Option<&'static str> {
        let open = self.reserved.values();
        let tokens = |usage: &TokenUsage| usage.prompt_tokens + usage.completion_tokens;
        let all_tokens = tokens(&self.spent) + open.clone().map(tokens).sum::<u64>() + tokens(&estimate);
        let money = self.money(&self.spent) + open.map(|usage| self.money(usage)).sum::<f64>() + self.money(&estimate);
        let new = u64::from(!self.keys.contains(key));
        if self.limits.requests.is_some_and(|limit| self.keys.len() as u64 + new > limit) {
            Some("requests")
        } else if self.limits.tokens.is_some_and(|limit| all_tokens > limit) {
            Some("tokens")
        } else if self.limits.money.is_some_and(|limit| money > limit) {
            Some("money")
        } else {
            None
        }
    }

    /// Returns the price of tokens; 0 without prices.
    pub(super) fn money(&self, usage: &TokenUsage) -> f64 {
        let Some(price) = &self.price else { return 0.0 };
        let cached = usage.cached_tokens.min(usage.prompt_tokens);
        let input = (usage.prompt_tokens - cached) as f64 * price.input;
        (input + cached as f64 * price.cached.unwrap_or(price.input) + usage.completion_tokens as f64 * price.output)
            / 1e6
    }

    /// Returns the tokens that are spent.
    pub(super) fn spent(&self) -> TokenUsage {
        self.spent
    }

    /// Returns the number of distinct requests.
    pub(super) fn requests(&self) -> u64 {
        self.keys.len() as u64
    }

    /// Describes what is spent and what is left, for a line of progress.
    pub(super) fn describe(&self) -> String {
        let of = |spent: String, limit: Option<String>| match limit {
            Some(limit) => format!("{spent} of {limit}"),
            None => spent,
        };
        let limits = &self.limits;
        let requests = of(self.requests().to_string(), limits.requests.map(|n| n.to_string()));
        let tokens = self.spent.prompt_tokens + self.spent.completion_tokens;
        let tokens = of(tokens.to_string(), limits.tokens.map(|n| n.to_string()));
        let money = self.price.as_ref().map(|price| {
            let money = of(format!("{:.4}", self.money(&self.spent)), limits.money.map(|n| n.to_string()));
            format!(", {money} {}", price.currency).trim_end().to_owned()
        });
        format!("{requests} requests, {tokens} tokens{}", money.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(prompt_tokens: u64, completion_tokens: u64) -> TokenUsage {
        TokenUsage { prompt_tokens, completion_tokens, cached_tokens: 0 }
    }

    #[test]
    fn a_reservation_counts_until_it_is_settled_and_a_lost_one_for_ever() {
        let price = Price { input: 1.0, output: 2.0, cached: Some(0.5), currency: "EUR".into() };
        let limits = BudgetConfig { tokens: Some(100), money: Some(1.5e-4), requests: Some(3) };
        let mut budget = Budget::new(limits, Some(price));
        assert_eq!(budget.refuses("a", usage(50, 51)), Some("tokens"));
        assert_eq!(budget.refuses("a", usage(20, 70)), Some("money"));
        let sent = |key: &str, n| JournalEntry::Sent { i: 0, key: key.into(), reserved: usage(n, 0) };
        budget.record(&sent("a", 60));
        assert_eq!(budget.refuses("b", usage(41, 0)), Some("tokens"));
        assert_eq!(budget.refuses("b", usage(40, 0)), None);
        budget.close_lost();
        assert_eq!((budget.lost, budget.spent()), (1, usage(60, 0)));
        budget.record(&sent("b", 10));
        budget.record(&sent("c", 10));
        assert_eq!(budget.refuses("d", usage(1, 0)), Some("requests"));
        assert_eq!(budget.refuses("a", usage(1, 0)), None, "the same request is no new one");
        let cached = TokenUsage { prompt_tokens: 1_000_000, completion_tokens: 0, cached_tokens: 400_000 };
        assert!((budget.money(&cached) - 0.8).abs() < 1e-12);
    }
}
