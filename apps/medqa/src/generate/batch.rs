//! Batch files in OpenAI's format: requests out, results in.

use super::{
    answer::TokenUsage,
    journal::{JournalEntry, RequestEnd},
    recipe::ResponseFormat,
    request::ModelRequest,
};
use crate::write::write_atomically;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Limits of one batch file.
const MAX_LINES: usize = 50_000;
const MAX_BYTES: usize = 200 << 20;

/// Writes requests to a batch file.
///
/// # Errors
/// If they are more than a batch file may hold, or the file cannot be written.
pub(super) fn write_requests(path: &Path, requests: &[ModelRequest], format: ResponseFormat) -> Result<()> {
    let mut text = String::new();
    for request in requests {
        let url = format!("/v1{}", request.path());
        let line = json!({"custom_id": request.key, "method": "POST", "url": url, "body": request.body(format)});
        text += &format!("{line}\n");
    }
    if requests.len() > MAX_LINES || text.len() > MAX_BYTES {
        bail!(
            "{}: a batch file holds at most {MAX_LINES} requests and {} MB, found {} requests in {} MB; lower -n or --requests",
            path.display(),
            MAX_BYTES >> 20,
            requests.len(),
            text.len() >> 20
        );
    }
    write_atomically(path, text.as_bytes())
}

/// The results in a batch file.
pub(super) struct BatchResults {
    pub entries: Vec<JournalEntry>,
    /// One line for each request that has failed, or that this generation does not have.
    pub problems: Vec<String>,
}

/// Reads the results of requests. `items` maps the key of each request of this generation that is not answered to its
/// item; results that are known already are left out.
///
/// # Errors
/// If the file cannot be read, or a line is no result.
pub(super) fn read_results(
    path: &Path,
    items: &HashMap<String, u64>,
    is_known: impl Fn(&str) -> bool,
) -> Result<BatchResults> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
    let mut results = BatchResults { entries: Vec::new(), problems: Vec::new() };
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{}:{}", path.display(), number + 1);
        let expected = "expected a result with `custom_id` and `response` or `error`";
        let result: Value = serde_json::from_str(line).map_err(|error| anyhow!("{place}: {expected}: {error}"))?;
        let key = result["custom_id"].as_str().ok_or_else(|| anyhow!("{place}: {expected}"))?;
        let Some(&i) = items.get(key) else {
            if !is_known(key) {
                let id: String = key.chars().take(80).collect();
                results.problems.push(format!("{place}: `custom_id` {id} is no request of this recipe"));
            }
            continue;
        };
        let (status, body) = (result["response"]["status_code"].as_u64(), &result["response"]["body"]);
        let answered = status == Some(200) && result["error"].is_null() && body["error"].is_null();
        if !answered {
            let error = [&result["error"], &body["error"]].into_iter().find(|error| !error.is_null());
            let message: String = error.map(Value::to_string).unwrap_or_default().chars().take(200).collect();
            results.problems.push(format!("{place}: the request of item {i} has failed: {message}"));
            continue;
        }
        let end = RequestEnd {
            i,
            key: key.to_owned(),
            attempt: 0,
            status: Some(200),
            body: Some(body.clone()),
            error: None,
            usage: TokenUsage::of(body).unwrap_or_default(),
            started,
            ms: 0,
        };
        results.entries.push(JournalEntry::End(Box::new(end)));
    }
    Ok(results)
}
