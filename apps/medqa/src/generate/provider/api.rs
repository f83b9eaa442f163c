//! An OpenAI-compatible API.

use super::{
    super::{
        answer::join_events,
        recipe::{ApiConfig, ResponseFormat},
        request::ModelRequest,
        retry::{Consequence, RequestFailure, asked_wait},
    },
    Provider,
};
use crate::fetch;
use anyhow::{Result, bail};
use serde_json::Value;
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};
use ureq::{Agent, Body, http::Response};

/// The length in bytes from which a key is taken out of texts.
const MIN_SECRET: usize = 12;

/// Size limit of a response in bytes.
const BODY_LIMIT: u64 = 64 << 20;

/// An OpenAI-compatible API. The key is kept here only, and taken out of every text that comes back.
pub(in super::super) struct ApiProvider {
    agent: Agent,
    base_url: String,
    key: Option<String>,
    timeout: Duration,
    direct: bool,
    has_answered: AtomicBool,
}

impl ApiProvider {
    /// Creates the client of an API. The key comes from the environment variable that the recipe names; without one, a
    /// server on this machine is asked without a key.
    ///
    /// # Errors
    /// If the URL is none, the key is missing, or it would travel unencrypted and `allow_http` is false.
    pub(in super::super) fn new(api: &ApiConfig, base_url: &str, allow_http: bool) -> Result<Self> {
        let (base_url, name) = (base_url.trim_end_matches('/').to_owned(), &api.api_key_env);
        let scheme = base_url.split_once("://").map(|(scheme, _)| scheme);
        let loopback = is_loopback(&base_url);
        match scheme {
            Some("https") => {}
            Some("http") if loopback || allow_http => {}
            Some("http") => bail!(
                "`api.base_url`: expected https://, found {base_url}: prompts and the key would travel unencrypted; use \
                 https, or say --allow-http"
            ),
            _ => bail!("`api.base_url`: expected a URL such as https://api.openai.com/v1, found {base_url:?}"),
        }
        if base_url.split_once("://").is_some_and(|(_, rest)| rest.split('/').next().unwrap_or_default().contains('@'))
        {
            bail!("`api.base_url`: expected a URL without a name or password in it; the key belongs into ${name}");
        }
        let key = std::env::var(name).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty());
        if key.is_none() && !loopback {
            bail!("the environment variable {name} is not set: it must hold the key of {base_url} (`api.api_key_env`)");
        }
        if key.as_ref().is_some_and(|key| key.chars().any(|c| c.is_whitespace() || c.is_control())) {
            bail!("the environment variable {name}: expected a key on one line without spaces");
        }
        Ok(Self {
            agent: fetch::http_agent(Duration::from_secs(15))?,
            base_url,
            key,
            timeout: Duration::from_secs_f64(api.timeout_seconds),
            direct: loopback,
            has_answered: AtomicBool::new(false),
        })
    }

    fn post(&self, request: &ModelRequest, format: ResponseFormat) -> Result<Response<Body>, ureq::Error> {
        let mut config = self
            .agent
            .post(format!("{}{}", self.base_url, request.path()))
            .config()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(self.timeout))
            .timeout_recv_response(None)
            .timeout_per_read(None);
        if self.direct {
            config = config.proxy(None);
        }
        let mut post = config.build().header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            post = post.header("Authorization", format!("Bearer {key}"));
        }
        post.send(request.body(format).to_string())
    }

    /// Takes the key out of a text, in which a server may repeat it.
    fn without_key(&self, text: String) -> String {
        match &self.key {
            // A dummy key of a local server may be an ordinary word.
            Some(key) if key.len() >= MIN_SECRET && text.contains(key) => text.replace(key, "***"),
            _ => text,
        }
    }

    fn failure(&self, error: &ureq::Error) -> RequestFailure {
        let not_sent = matches!(error, ureq::Error::HostNotFound | ureq::Error::ConnectionFailed)
            || matches!(error, ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve))
            || matches!(error, ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
        let message = self.without_key(fetch::describe_http_error(&self.base_url, error));
        RequestFailure::without_response(message, !not_sent)
    }

    /// Reads a response of status 200.
    fn read(&self, text: &str) -> Result<Value, RequestFailure> {
        let body = match serde_json::from_str::<Value>(text) {
            Ok(body) => body,
            Err(_) => match join_events(text) {
                Some(body) => body,
                None => return Err(self.no_api(text)),
            },
        };
        if body.get("error").is_some_and(|error| !error.is_null()) {
            return Err(RequestFailure::from_error_body(text));
        }
        self.has_answered.store(true, Ordering::Relaxed);
        Ok(body)
    }

    /// Describes a response that is not JSON. Before the first answer, the address must be wrong.
    fn no_api(&self, text: &str) -> RequestFailure {
        let start: String = text.trim_start().chars().take(60).collect();
        let kind = if start.to_lowercase().starts_with(['<']) { "an HTML page" } else { "a text that is not JSON" };
        let message = format!("{}: expected an answer in JSON, found {kind}: {start:?}", self.base_url);
        let failure = RequestFailure::without_response(message, true);
        if self.has_answered.load(Ordering::Relaxed) {
            return failure;
        }
        let message = format!("{}; check `api.base_url`, which often ends in /v1", failure.message);
        RequestFailure { message, consequence: Consequence::Stop, ..failure }
    }
}

impl Provider for ApiProvider {
    fn answer(&self, request: &ModelRequest, format: ResponseFormat) -> Result<Value, RequestFailure> {
        let mut response = self.post(request, format).map_err(|error| self.failure(&error))?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let wait = asked_wait(header("retry-after-ms"), header("retry-after"), SystemTime::now());
        let text = response.body_mut().with_config().limit(BODY_LIMIT).lossy_utf8(true).read_to_string();
        let text = self.without_key(text.map_err(|error| self.failure(&error))?);
        match status {
            200..=299 => self.read(&text),
            _ => Err(RequestFailure::from_response(status, &text, wait)),
        }
    }
}

/// Returns whether a URL names this machine.
fn is_loopback(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str, allow_http: bool) -> String {
        let api = ApiConfig { api_key_env: "MEDQA_TEST_NO_SUCH_KEY".to_owned(), ..ApiConfig::default() };
        ApiProvider::new(&api, url, allow_http).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn addresses_that_would_leak_are_refused() {
        assert_eq!(refused("http://127.0.0.1:8000/v1", false), "");
        assert_eq!(refused("http://[::1]:8000", false), "");
        assert!(refused("http://example.org/v1", false).contains("unencrypted"));
        assert!(refused("http://127.0.0.1.example.org/v1", false).contains("unencrypted"));
        assert!(refused("http://example.org/v1", true).contains("MEDQA_TEST_NO_SUCH_KEY is not set"));
        assert!(refused("https://example.org/v1", false).contains("is not set"));
        assert!(refused("https://me:secret@example.org/v1", false).contains("without a name or password"));
        assert!(!refused("https://me:secret@example.org/v1", false).contains("secret@"));
        assert!(refused("api.openai.com", false).contains("such as https://"));
    }
}
