//! Download of one large file over HTTP, resumed where an earlier attempt was interrupted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ureq::Agent;
use ureq::http::Response;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE};

use super::{cache, http, index::IndexFile};

/// Attempts per call; each resumes where the last one stopped.
const MAX_ATTEMPTS: u32 = 5;

/// Reason for the failure of one attempt.
enum DownloadError {
    /// Another attempt may succeed: the connection broke, or the server is busy.
    Retryable(anyhow::Error),
    /// Another attempt would fail too.
    Permanent(anyhow::Error),
}

/// Downloads a listed file into the partial file `part`, appending to its content, until the file is complete and its
/// hash, if known, is right.
pub(super) fn download(agent: &Agent, index_file: &IndexFile, part: &Path) -> Result<()> {
    let kept = file_size(part);
    if kept > 0 {
        eprintln!("{}: resuming after {}", index_file.filename, megabytes(kept));
    }
    download_with_retries(agent, index_file, part)?;
    if hash_matches(index_file, part)? {
        return Ok(());
    }
    // Bytes kept from an earlier run may belong to another file, so the file is downloaded once more from the start.
    remove_partial(part)?;
    if kept > 0 {
        eprintln!("{}: the part kept from an earlier run was wrong; downloading from the start", index_file.filename);
        download_with_retries(agent, index_file, part)?;
        if hash_matches(index_file, part)? {
            return Ok(());
        }
        remove_partial(part)?;
    }
    bail!("{}: the downloaded file does not have the SHA-256 of the index and was deleted", index_file.url)
}

fn hash_matches(index_file: &IndexFile, part: &Path) -> Result<bool> {
    match &index_file.sha256 {
        Some(expected) => Ok(cache::sha256_of(part)? == *expected),
        None => Ok(true),
    }
}

fn download_with_retries(agent: &Agent, index_file: &IndexFile, part: &Path) -> Result<()> {
    for tried in 1.. {
        match attempt(agent, index_file, part) {
            Ok(()) => break,
            Err(DownloadError::Permanent(error)) => return Err(error),
            Err(DownloadError::Retryable(error)) if tried == MAX_ATTEMPTS => {
                let kept = megabytes(file_size(part));
                return Err(
                    error.context(format!("gave up after {MAX_ATTEMPTS} attempts; {kept} are kept for the next run"))
                );
            }
            Err(DownloadError::Retryable(error)) => {
                eprintln!("{}: {error:#}; trying again", index_file.filename);
                std::thread::sleep(Duration::from_millis(250 << tried));
            }
        }
    }
    Ok(())
}

fn attempt(agent: &Agent, index_file: &IndexFile, part: &Path) -> Result<(), DownloadError> {
    let kept = file_size(part);
    let mut request = agent.get(&index_file.url).header("Accept-Encoding", "identity");
    if let Some(authorization) = &index_file.authorization {
        request = request.header("Authorization", authorization);
    }
    if kept > 0 {
        request = request.header("Range", format!("bytes={kept}-"));
    }
    let response = match request.call() {
        Ok(response) => response,
        // The server has nothing beyond the kept bytes: they are the complete file or belong to another one, which the
        // hash will show.
        Err(ureq::Error::StatusCode(416)) if kept > 0 && index_file.sha256.is_some() => return Ok(()),
        Err(ureq::Error::StatusCode(416)) if kept > 0 => {
            remove_partial(part).map_err(DownloadError::Permanent)?;
            return Err(DownloadError::Retryable(anyhow!("the kept part does not belong to this file")));
        }
        Err(error) => return Err(classify_error(&index_file.url, &error)),
    };
    let start = resume_offset(&response, kept);
    let left = header(&response, CONTENT_LENGTH.as_str()).and_then(|text| text.parse::<u64>().ok());
    let file = open_at(part, start).map_err(DownloadError::Permanent)?;
    let progress = DownloadProgress::new(&index_file.filename, start, left.map(|left| start + left));
    copy_body(response.into_body().into_reader(), file, progress)?;
    match left {
        Some(left) if file_size(part) != start + left => {
            Err(DownloadError::Retryable(anyhow!("the connection ended after {} of {}", file_size(part), start + left)))
        }
        _ => Ok(()),
    }
}

fn classify_error(url: &str, error: &ureq::Error) -> DownloadError {
    let reason = anyhow!(http::describe_error(url, error));
    match error {
        ureq::Error::StatusCode(408 | 429 | 500..) => DownloadError::Retryable(reason),
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed => {
            DownloadError::Retryable(reason)
        }
        _ => DownloadError::Permanent(reason),
    }
}

/// Returns the offset of the response's first byte in the file; a server that ignores the range sends the file from its
/// start.
fn resume_offset(response: &Response<ureq::Body>, kept: u64) -> u64 {
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

fn copy_body(mut body: impl Read, mut file: File, mut progress: DownloadProgress) -> Result<(), DownloadError> {
    let mut block = vec![0; 1 << 16];
    loop {
        let read = match body.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(DownloadError::Retryable(anyhow!("the connection broke: {error}"))),
        };
        // Another request does not help if the disk is full.
        file.write_all(&block[..read])
            .map_err(|error| DownloadError::Permanent(anyhow!("the cache cannot be written: {error}")))?;
        progress.advance(read as u64);
    }
}

fn file_size(part: &Path) -> u64 {
    fs::metadata(part).map_or(0, |about| about.len())
}

fn remove_partial(part: &Path) -> Result<()> {
    fs::remove_file(part).with_context(|| format!("{}: cannot be removed", part.display()))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Progress display of a download: a bar on a terminal, otherwise one line per quarter.
struct DownloadProgress {
    bar: Option<ProgressBar>,
    name: String,
    position: u64,
    total: Option<u64>,
    next_report: u64,
}

impl DownloadProgress {
    fn new(name: &str, at: u64, total: Option<u64>) -> Self {
        let bar = io::stderr().is_terminal().then(|| progress_bar(name, at, total));
        if bar.is_none() {
            eprintln!("{name}: downloading {}", total.map_or("a file of unknown size".into(), megabytes));
        }
        let quarter = total.map_or(u64::MAX, |total| (total / 4).max(1));
        Self {
            bar,
            name: name.to_string(),
            position: at,
            total,
            next_report: (at / quarter + 1).saturating_mul(quarter),
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.position += bytes;
        match (&self.bar, self.total) {
            (Some(bar), _) => bar.set_position(self.position),
            (None, Some(total)) if self.position >= self.next_report => {
                eprintln!("{}: {} of {}", self.name, megabytes(self.position), megabytes(total));
                self.next_report += (total / 4).max(1);
            }
            _ => {}
        }
    }
}

fn progress_bar(name: &str, at: u64, total: Option<u64>) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    // If the template cannot be parsed, only the appearance of the bar changes.
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
