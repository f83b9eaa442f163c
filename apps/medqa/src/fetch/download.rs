//! One large file over HTTP, continued where an earlier attempt was cut off.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ureq::Agent;
use ureq::http::Response;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE};

use super::{cache, http, index::Offer};

/// Tries in one call; each continues where the last one stopped.
const TRIES: u32 = 5;

/// Why one try ended.
enum Cut {
    /// Trying again may help: the link broke, the server is busy.
    Again(anyhow::Error),
    /// It will not.
    Final(anyhow::Error),
}

/// Downloads `offer` into `part`, appending to what is there, until it is whole and its hash, if known, is right.
pub fn download(agent: &Agent, offer: &Offer, part: &Path) -> Result<()> {
    let kept = size(part);
    if kept > 0 {
        eprintln!("{}: continuing after {}", offer.filename, megabytes(kept));
    }
    transfer(agent, offer, part)?;
    if is_right(offer, part)? {
        return Ok(());
    }
    // Bytes kept from an earlier run may belong to another file; one download from the start settles it.
    discard(part)?;
    if kept > 0 {
        eprintln!("{}: the part kept from an earlier run was wrong; downloading it anew", offer.filename);
        transfer(agent, offer, part)?;
        if is_right(offer, part)? {
            return Ok(());
        }
        discard(part)?;
    }
    bail!("{}: what came has not the SHA-256 that the index states; it was thrown away", offer.url)
}

fn is_right(offer: &Offer, part: &Path) -> Result<bool> {
    match &offer.sha256 {
        Some(expected) => Ok(cache::sha256_of(part)? == *expected),
        None => Ok(true),
    }
}

fn transfer(agent: &Agent, offer: &Offer, part: &Path) -> Result<()> {
    for tried in 1.. {
        match attempt(agent, offer, part) {
            Ok(()) => break,
            Err(Cut::Final(error)) => return Err(error),
            Err(Cut::Again(error)) if tried == TRIES => {
                let kept = megabytes(size(part));
                return Err(error.context(format!("gave up after {TRIES} tries; {kept} are kept for the next run")));
            }
            Err(Cut::Again(error)) => {
                eprintln!("{}: {error:#}; trying again", offer.filename);
                std::thread::sleep(Duration::from_millis(250 << tried));
            }
        }
    }
    Ok(())
}

fn attempt(agent: &Agent, offer: &Offer, part: &Path) -> Result<(), Cut> {
    let kept = size(part);
    let mut request = agent.get(&offer.url).header("Accept-Encoding", "identity");
    if let Some(authorization) = &offer.authorization {
        request = request.header("Authorization", authorization);
    }
    if kept > 0 {
        request = request.header("Range", format!("bytes={kept}-"));
    }
    let response = match request.call() {
        Ok(response) => response,
        // Nothing lies beyond what is kept: it is whole, or no part of this file, which its hash will tell.
        Err(ureq::Error::StatusCode(416)) if kept > 0 && offer.sha256.is_some() => return Ok(()),
        Err(ureq::Error::StatusCode(416)) if kept > 0 => {
            discard(part).map_err(Cut::Final)?;
            return Err(Cut::Again(anyhow!("the kept part does not fit")));
        }
        Err(error) => return Err(judge(&offer.url, &error)),
    };
    let start = continues_at(&response, kept);
    let left = header(&response, CONTENT_LENGTH.as_str()).and_then(|text| text.parse::<u64>().ok());
    let file = open_at(part, start).map_err(Cut::Final)?;
    let progress = Progress::new(&offer.filename, start, left.map(|left| start + left));
    copy(response.into_body().into_reader(), file, progress)?;
    match left {
        Some(left) if size(part) != start + left => {
            Err(Cut::Again(anyhow!("the connection ended after {} of {}", size(part), start + left)))
        }
        _ => Ok(()),
    }
}

fn judge(url: &str, error: &ureq::Error) -> Cut {
    let reason = anyhow!(http::reason(url, error));
    match error {
        ureq::Error::StatusCode(408 | 429 | 500..) => Cut::Again(reason),
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed => Cut::Again(reason),
        _ => Cut::Final(reason),
    }
}

/// Where the answer's first byte belongs: a server that ignores the range sends the file from its start.
fn continues_at(response: &Response<ureq::Body>, kept: u64) -> u64 {
    let range = header(response, CONTENT_RANGE.as_str()).unwrap_or_default();
    let agrees = range.strip_prefix("bytes ").is_some_and(|range| range.starts_with(&format!("{kept}-")));
    if response.status() == 206 && agrees { kept } else { 0 }
}

fn header<'a>(response: &'a Response<ureq::Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn open_at(part: &Path, start: u64) -> Result<File> {
    let unwritable = || format!("{}: cannot be written", part.display());
    let file = OpenOptions::new().create(true).append(true).open(part).with_context(unwritable)?;
    if start == 0 {
        file.set_len(0).with_context(unwritable)?;
    }
    Ok(file)
}

fn copy(mut body: impl Read, mut file: File, mut progress: Progress) -> Result<(), Cut> {
    let mut block = vec![0; 1 << 16];
    loop {
        let read = match body.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Cut::Again(anyhow!("the connection broke: {error}"))),
        };
        // A full disk is not mended by asking the server again.
        file.write_all(&block[..read]).map_err(|error| Cut::Final(anyhow!("the cache cannot be written: {error}")))?;
        progress.advance(read as u64);
    }
}

fn size(part: &Path) -> u64 {
    fs::metadata(part).map_or(0, |about| about.len())
}

fn discard(part: &Path) -> Result<()> {
    fs::remove_file(part).with_context(|| format!("{}: cannot be removed", part.display()))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A bar on a terminal, a line per quarter elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    name: String,
    at: u64,
    total: Option<u64>,
    next: u64,
}

impl Progress {
    fn new(name: &str, at: u64, total: Option<u64>) -> Self {
        let bar = io::stderr().is_terminal().then(|| bar(name, at, total));
        if bar.is_none() {
            eprintln!("{name}: downloading {}", total.map_or("a file of unknown size".into(), megabytes));
        }
        let quarter = total.map_or(u64::MAX, |total| (total / 4).max(1));
        Self { bar, name: name.to_string(), at, total, next: (at / quarter + 1).saturating_mul(quarter) }
    }

    fn advance(&mut self, bytes: u64) {
        self.at += bytes;
        match (&self.bar, self.total) {
            (Some(bar), _) => bar.set_position(self.at),
            (None, Some(total)) if self.at >= self.next => {
                eprintln!("{}: {} of {}", self.name, megabytes(self.at), megabytes(total));
                self.next += (total / 4).max(1);
            }
            _ => {}
        }
    }
}

fn bar(name: &str, at: u64, total: Option<u64>) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    // A template of ours that does not parse costs the looks only.
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(name.to_string());
    bar.set_position(at);
    bar.reset_eta();
    bar
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
