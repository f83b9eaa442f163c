//! Finds a wheel in a package index: PEP 691 JSON where the index offers it, PEP 503 HTML otherwise.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use ureq::{Agent, ResponseExt};

use super::{http, pip_config, url};

/// The index that pip uses when nobody says otherwise.
const DEFAULT_INDEX: &str = "https://pypi.org/simple";
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
/// A project's page is small; this is to stop what is no index page.
const PAGE_LIMIT: u64 = 32 << 20;

/// A file that an index offers.
#[derive(Debug, PartialEq, Eq)]
pub struct Offer {
    /// The file's own name.
    pub filename: String,
    /// Absolute, without credentials.
    pub url: String,
    /// What the index says of its content, lower case; not every index does.
    pub sha256: Option<String>,
    /// `Authorization` header to ask for it with.
    pub authorization: Option<String>,
}

/// The wheel of `project` in `version` on this machine's index, and the client that reached it.
pub fn find_wheel(project: &str, version: &str) -> Result<(Agent, Offer)> {
    if pip_config::option("no-index").is_some_and(|value| pip_config::is_true(&value)) {
        bail!("pip is told to use no index (`no-index`), and so are we");
    }
    let index = pip_config::option("index-url").unwrap_or_else(|| DEFAULT_INDEX.to_string());
    let (index, authorization) = url::split_credentials(&index);
    let agent = http::agent(Duration::from_secs(15))?;
    let page = format!("{}/{project}/", index.trim_end_matches('/'));
    let (page, offers) = offers(&agent, &page, authorization.as_deref())?;
    let start = format!("{}-{version}-", project.replace('-', "_"));
    let known = offers.len();
    let mut offer = offers
        .into_iter()
        .find(|offer| offer.filename.starts_with(&start) && offer.filename.ends_with(".whl"))
        .ok_or_else(|| anyhow!("{page}: expected a wheel {start}….whl, found {known} files and none is it"))?;
    let (plain, own) = url::split_credentials(&offer.url);
    offer.authorization = own.or(authorization.filter(|_| url::origin(&plain) == url::origin(&index)));
    offer.url = plain;
    Ok((agent, offer))
}

/// The page's address after redirects, and what it offers.
fn offers(agent: &Agent, page: &str, authorization: Option<&str>) -> Result<(String, Vec<Offer>)> {
    let mut request = agent.get(page).header("Accept", ACCEPT);
    if let Some(authorization) = authorization {
        request = request.header("Authorization", authorization);
    }
    let mut response = request.call().map_err(|error| anyhow!(http::reason(page, &error)))?;
    // Relative links count from where the redirects ended.
    let page = response.get_uri().to_string();
    let is_json = response.body().mime_type().is_some_and(|mime| mime.ends_with("json"));
    let text = response
        .body_mut()
        .with_config()
        .limit(PAGE_LIMIT)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(|error| anyhow!(http::reason(&page, &error)))?;
    let offers = if is_json { in_json(&page, &text)? } else { in_html(&page, &text) };
    if offers.is_empty() {
        bail!("{page}: expected a package index's page, found no file in it; is the index-url right?");
    }
    Ok((page, offers))
}

#[derive(Deserialize)]
struct Page {
    files: Vec<PageFile>,
}

#[derive(Deserialize)]
struct PageFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::HashMap<String, String>,
}

fn in_json(page: &str, text: &str) -> Result<Vec<Offer>> {
    let parsed: Page =
        serde_json::from_str(text).with_context(|| format!("{page}: expected an index page in JSON (PEP 691)"))?;
    let offer = |file: PageFile| Offer {
        filename: file.filename,
        url: url::join(page, &file.url),
        sha256: file.hashes.get("sha256").map(|hash| hash.to_ascii_lowercase()),
        authorization: None,
    };
    Ok(parsed.files.into_iter().map(offer).collect())
}

/// Every `<a href>` of the page; a `<base href>` moves what relative links count from.
fn in_html(page: &str, text: &str) -> Vec<Offer> {
    let base = tags(text, "base").next().map_or_else(|| page.to_string(), |link| url::join(page, &link));
    tags(text, "a").map(|link| offer(&url::join(&base, &link))).collect()
}

fn offer(link: &str) -> Offer {
    let (plain, fragment) = link.split_once('#').unwrap_or((link, ""));
    let name = plain.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
    Offer {
        filename: String::from_utf8_lossy(&url::percent_decode(name)).into_owned(),
        url: plain.to_string(),
        sha256: fragment.split('&').find_map(|part| part.strip_prefix("sha256=")).map(str::to_ascii_lowercase),
        authorization: None,
    }
}

/// The `href` of each tag called `name`. A `>` does not end the tag: attributes such as `data-requires-python` hold it.
fn tags<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    text.split('<').filter_map(move |tag| {
        let head = tag.get(..name.len())?;
        let rest = &tag[name.len()..];
        let named = head.eq_ignore_ascii_case(name) && rest.starts_with(char::is_whitespace);
        named.then(|| href(rest)).flatten()
    })
}

fn href(attributes: &str) -> Option<String> {
    let lower = attributes.to_ascii_lowercase();
    let (at, _) = lower.match_indices("href").find(|(at, _)| {
        lower[..*at].ends_with(|c: char| c.is_whitespace() || c == '"' || c == '\'')
            && lower[at + 4..].trim_start().starts_with('=')
    })?;
    let value = attributes[at + 4..].trim_start().strip_prefix('=')?.trim_start();
    let value = match value.chars().next()? {
        quote @ ('"' | '\'') => value[1..].split(quote).next()?,
        _ => value.split(|c: char| c.is_whitespace() || c == '>').next()?,
    };
    Some(value.replace("&#38;", "&").replace("&amp;", "&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_pages_are_read() {
        let text = "<!DOCTYPE html><abbr href='no.whl'>\n<A data-x=\">=1\"\n HREF = '../../f/a_b-1-py3.whl#sha256=ABC&x=1'>a</A><a href=\"c%2Bd.zip?x=1&amp;y=2\" rel=x>";
        let found = in_html("https://h/simple/p/", text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].url, "https://h/f/a_b-1-py3.whl");
        assert_eq!((found[0].filename.as_str(), found[0].sha256.as_deref()), ("a_b-1-py3.whl", Some("abc")));
        assert_eq!((found[1].filename.as_str(), found[1].sha256.as_deref()), ("c+d.zip", None));
        assert_eq!(found[1].url, "https://h/simple/p/c%2Bd.zip?x=1&y=2");
        let based = in_html("https://h/simple/p/", "<base href=\"/files/\"><a href=x.whl>");
        assert_eq!(based[0].url, "https://h/files/x.whl");
        assert!(in_html("https://h/", "<a>é<a href><é href=\"x\"").is_empty());
    }

    #[test]
    fn json_pages_are_read() {
        let text = r#"{"meta": {}, "files": [{"filename": "x.whl", "url": "../x.whl", "hashes": {"sha256": "AB"}}]}"#;
        let found = in_json("https://h/simple/p/", text).unwrap();
        assert_eq!((found[0].url.as_str(), found[0].sha256.as_deref()), ("https://h/simple/x.whl", Some("ab")));
        assert!(format!("{:#}", in_json("https://h/", "{}").unwrap_err()).contains("https://h/"));
    }
}
