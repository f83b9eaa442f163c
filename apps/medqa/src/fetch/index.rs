//! Finds a wheel in a package index: PEP 691 JSON where the index offers it, PEP 503 HTML otherwise.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use ureq::{Agent, ResponseExt};

use super::{http, pip_config, url};

/// The index that pip uses by default.
const DEFAULT_INDEX: &str = "https://pypi.org/simple";
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
/// Size limit of an index page in bytes. A project's page is small, so anything larger is not an index page.
const PAGE_LIMIT: u64 = 32 << 20;

/// A file that a package index lists.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IndexFile {
    /// Name of the file.
    pub filename: String,
    /// Absolute URL, without credentials.
    pub url: String,
    /// SHA-256 in lower case, if the index states it.
    pub sha256: Option<String>,
    /// Value of the `Authorization` header for the download.
    pub authorization: Option<String>,
}

/// Finds the wheel of `project` in `version` on this machine's index. Also returns the client that reached the index.
pub(super) fn find_wheel(project: &str, version: &str) -> Result<(Agent, IndexFile)> {
    find_file(project, &format!("{}-{version}-", project.replace('-', "_")), ".whl")
}

/// Finds the file of `project` whose name has this start and end on this machine's index. Also returns the client that
/// reached the index.
pub(super) fn find_file(project: &str, start: &str, end: &str) -> Result<(Agent, IndexFile)> {
    if pip_config::option("no-index").is_some_and(|value| pip_config::is_true(&value)) {
        bail!("pip is configured to use no index (`no-index`), so none is asked here either");
    }
    let index = pip_config::option("index-url").unwrap_or_else(|| DEFAULT_INDEX.to_string());
    let (index, authorization) = url::split_credentials(&index);
    let agent = http::agent(Duration::from_secs(15))?;
    let page = format!("{}/{project}/", index.trim_end_matches('/'));
    let (page, files) = list_files(&agent, &page, authorization.as_deref())?;
    let known = files.len();
    let mut index_file = files
        .into_iter()
        .find(|offer| offer.filename.starts_with(start) && offer.filename.ends_with(end))
        .ok_or_else(|| anyhow!("{page}: expected a file {start}…{end}, found {known} other files"))?;
    let (plain, own) = url::split_credentials(&index_file.url);
    index_file.authorization = own.or(authorization.filter(|_| url::origin(&plain) == url::origin(&index)));
    index_file.url = plain;
    Ok((agent, index_file))
}

/// Reads an index page. Returns its address after redirects, and the files that it lists.
fn list_files(agent: &Agent, page: &str, authorization: Option<&str>) -> Result<(String, Vec<IndexFile>)> {
    let mut request = agent.get(page).header("Accept", ACCEPT);
    if let Some(authorization) = authorization {
        request = request.header("Authorization", authorization);
    }
    let mut response = request.call().map_err(|error| anyhow!(http::describe_error(page, &error)))?;
    // Relative links are resolved against the address after redirects.
    let page = response.get_uri().to_string();
    let is_json = response.body().mime_type().is_some_and(|mime| mime.ends_with("json"));
    let text = response
        .body_mut()
        .with_config()
        .limit(PAGE_LIMIT)
        .lossy_utf8(true)
        .read_to_string()
        .map_err(|error| anyhow!(http::describe_error(&page, &error)))?;
    let files = if is_json { parse_json_page(&page, &text)? } else { parse_html_page(&page, &text) };
    if files.is_empty() {
        bail!("{page}: expected a package index page, found no files on it; is the index-url right?");
    }
    Ok((page, files))
}

#[derive(Deserialize)]
struct ProjectPage {
    files: Vec<ProjectFile>,
}

#[derive(Deserialize)]
struct ProjectFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::HashMap<String, String>,
}

fn parse_json_page(page: &str, text: &str) -> Result<Vec<IndexFile>> {
    let parsed: ProjectPage =
        serde_json::from_str(text).with_context(|| format!("{page}: expected an index page in JSON (PEP 691)"))?;
    let to_index_file = |file: ProjectFile| IndexFile {
        filename: file.filename,
        url: url::join(page, &file.url),
        sha256: file.hashes.get("sha256").map(|hash| hash.to_ascii_lowercase()),
        authorization: None,
    };
    Ok(parsed.files.into_iter().map(to_index_file).collect())
}

/// Returns the target of every `<a href>` of the page; relative links are resolved against a `<base href>` if there is
/// one.
fn parse_html_page(page: &str, text: &str) -> Vec<IndexFile> {
    let base = tag_links(text, "base").next().map_or_else(|| page.to_string(), |link| url::join(page, &link));
    tag_links(text, "a").map(|link| file_from_link(&url::join(&base, &link))).collect()
}

fn file_from_link(link: &str) -> IndexFile {
    let (plain, fragment) = link.split_once('#').unwrap_or((link, ""));
    let name = plain.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
    IndexFile {
        filename: String::from_utf8_lossy(&url::percent_decode(name)).into_owned(),
        url: plain.to_string(),
        sha256: fragment.split('&').find_map(|part| part.strip_prefix("sha256=")).map(str::to_ascii_lowercase),
        authorization: None,
    }
}

/// Returns the `href` of each tag called `name`. A `>` does not end the tag, since attributes such as
/// `data-requires-python` may contain it.
fn tag_links<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
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
        let found = parse_html_page("https://h/simple/p/", text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].url, "https://h/f/a_b-1-py3.whl");
        assert_eq!((found[0].filename.as_str(), found[0].sha256.as_deref()), ("a_b-1-py3.whl", Some("abc")));
        assert_eq!((found[1].filename.as_str(), found[1].sha256.as_deref()), ("c+d.zip", None));
        assert_eq!(found[1].url, "https://h/simple/p/c%2Bd.zip?x=1&y=2");
        let based = parse_html_page("https://h/simple/p/", "<base href=\"/files/\"><a href=x.whl>");
        assert_eq!(based[0].url, "https://h/files/x.whl");
        assert!(parse_html_page("https://h/", "<a>é<a href><é href=\"x\"").is_empty());
    }

    #[test]
    fn json_pages_are_read() {
        let text = r#"{"meta": {}, "files": [{"filename": "x.whl", "url": "../x.whl", "hashes": {"sha256": "AB"}}]}"#;
        let found = parse_json_page("https://h/simple/p/", text).unwrap();
        assert_eq!((found[0].url.as_str(), found[0].sha256.as_deref()), ("https://h/simple/x.whl", Some("ab")));
        assert!(format!("{:#}", parse_json_page("https://h/", "{}").unwrap_err()).contains("https://h/"));
    }
}
