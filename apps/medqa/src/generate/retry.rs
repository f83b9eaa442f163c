//! The rules for requests that fail: which ones are sent again, and when.

use burn_peft::random;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// The longest wait that is kept; a server that asks for more is asked again in a later run.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The consequence of a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Consequence {
    /// The request is sent again.
    Retry,
    /// The request is sent again, and fewer at a time.
    RetrySlower,
    /// The row is given up.
    GiveUp,
    /// The run ends: every other request would fail too.
    Stop,
}

/// A failed request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RequestFailure {
    /// Status of HTTP; none if there was no response.
    pub status: Option<u16>,
    pub message: String,
    pub consequence: Consequence,
    /// The wait that the server asked for.
    pub wait: Option<Duration>,
    /// True if the server may have made an answer all the same.
    pub may_be_billed: bool,
    /// True if the server does not know the structure that was asked for.
    pub format_refused: bool,
}

impl RequestFailure {
    /// Creates a failure without a response.
    pub(super) fn without_response(message: String, may_be_billed: bool) -> Self {
        let consequence = Consequence::Retry;
        Self { status: None, message, consequence, wait: None, may_be_billed, format_refused: false }
    }

    /// Creates the failure that an error response means.
    pub(super) fn from_response(status: u16, text: &str, wait: Option<Duration>) -> Self {
        let body: Value = serde_json::from_str(text).unwrap_or_default();
        let error = &body["error"];
        let message = error["message"].as_str().or_else(|| error.as_str()).or_else(|| body["message"].as_str());
        let message: String = message.unwrap_or(text).chars().take(300).collect();
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        let code = [&error["code"], &error["type"]].into_iter().filter_map(Value::as_str);
        let out_of_money =
            code.clone().any(|code| ["insufficient_quota", "billing_hard_limit_reached"].contains(&code));
        let consequence = match status {
            _ if out_of_money => Consequence::Stop,
            401..=404 | 300..=399 => Consequence::Stop,
            429 | 529 => Consequence::RetrySlower,
            408 | 409 | 500 | 502 | 503 | 504 => Consequence::Retry,
            _ => Consequence::GiveUp,
        };
        let consequence = match (consequence, wait) {
            (Consequence::Retry | Consequence::RetrySlower, Some(wait)) if wait > LONGEST_WAIT => Consequence::Stop,
            (consequence, _) => consequence,
        };
        let format_refused = status == 400 && ["response_format", "json_schema"].iter().any(|word| text.contains(word));
        Self { status: Some(status), message, consequence, wait, may_be_billed: false, format_refused }
    }

    /// Creates the failure of a response of status 200 that holds an error, as some proxies send it.
    pub(super) fn from_error_body(text: &str) -> Self {
        let body: Value = serde_json::from_str(text).unwrap_or_default();
        let error = &body["error"];
        let code = error["code"].as_u64().and_then(|code| u16::try_from(code).ok()).filter(|code| *code >= 400);
        let limited = ["type", "code"].iter().any(|key| error[*key].as_str().is_some_and(|s| s.contains("rate_limit")));
        Self::from_response(code.unwrap_or(if limited { 429 } else { 500 }), text, None)
    }

    /// Describes the failure in one line.
    pub(super) fn describe(&self) -> String {
        match self.status {
            Some(status) => format!("the server answered {status}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

/// Returns the wait before an attempt after `failures` failed ones, without a word of the server: up to a minute, with
/// a part that depends on the request.
pub(super) fn backoff(failures: u32, key: &str) -> Duration {
    let longest = (0.5 * 2_f64.powi(failures.saturating_sub(1).min(10) as i32)).min(60.0);
    let jitter = random::uniform(random::key_from_str(key), failures.into());
    Duration::from_secs_f64(longest * (0.75 + 0.25 * jitter))
}

/// Reads the wait that a server asks for: `retry-after-ms`, else `Retry-After` in seconds or as a date.
pub(super) fn asked_wait(milliseconds: Option<&str>, retry_after: Option<&str>, now: SystemTime) -> Option<Duration> {
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|n| (0.0..1e9).contains(n));
    if let Some(milliseconds) = milliseconds.and_then(number) {
        return Some(Duration::from_secs_f64(milliseconds / 1e3));
    }
    let text = retry_after?;
    if let Some(seconds) = number(text) {
        return Some(Duration::from_secs_f64(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text.trim()).ok()?;
    let seconds = u64::try_from(date.timestamp().as_second()).ok()?;
    let until = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    Some(until.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_that_can_pass_are_sent_again() {
        use Consequence::{GiveUp, Retry, RetrySlower, Stop};
        let quota = r#"{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}"#;
        for (status, text, expected) in [
            (408, "", Retry),
            (409, "", Retry),
            (429, r#"{"error":{"message":"slow"}}"#, RetrySlower),
            (429, quota, Stop),
            (500, "", Retry),
            (502, "<html>", Retry),
            (503, "", Retry),
            (504, "", Retry),
            (529, "", RetrySlower),
            (400, "", GiveUp),
            (401, "", Stop),
            (403, "", Stop),
            (404, "", Stop),
            (413, "", GiveUp),
            (422, "", GiveUp),
            (302, "", Stop),
        ] {
            assert_eq!(RequestFailure::from_response(status, text, None).consequence, expected, "{status} {text}");
        }
        let hour = Some(Duration::from_secs(3600));
        assert_eq!(RequestFailure::from_response(429, "", hour).consequence, Stop);
        let refused = RequestFailure::from_response(400, r#"{"error":{"message":"response_format: unknown"}}"#, None);
        assert!(refused.format_refused && !RequestFailure::from_response(400, "no", None).format_refused);
        let error = |text: &str| RequestFailure::from_error_body(text).consequence;
        assert_eq!(error(r#"{"error":{"code":401,"message":"x"}}"#), Stop);
        assert_eq!(error(r#"{"error":{"type":"rate_limit_error"}}"#), RetrySlower);
        assert_eq!(error(r#"{"error":"busy"}"#), Retry);
        assert_eq!(error(quota), Stop);
    }

    #[test]
    fn three_forms_of_a_wait_are_read() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_480);
        let seconds = |ms, after| asked_wait(ms, after, now).map(|wait| wait.as_secs_f64());
        assert_eq!(seconds(Some("1500"), Some("9")), Some(1.5));
        assert_eq!(seconds(None, Some("2")), Some(2.0));
        assert_eq!(seconds(None, Some("Wed, 21 Oct 2015 07:28:05 GMT")), Some(5.0));
        assert_eq!(seconds(None, Some("Wed, 21 Oct 2015 07:27:00 GMT")), Some(0.0));
        assert_eq!(seconds(Some("-1"), Some("soon")), None);
        assert_eq!(seconds(None, None), None);
    }

    #[test]
    fn waits_grow_up_to_a_minute() {
        for failures in 1..12 {
            let longest = (0.5 * 2_f64.powi(failures as i32 - 1)).min(60.0);
            let wait = backoff(failures, "key").as_secs_f64();
            assert!((longest * 0.75..=longest).contains(&wait), "{failures}: {wait}");
        }
        assert_ne!(backoff(3, "a"), backoff(3, "b"));
    }
}
