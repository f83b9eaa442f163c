//! The files that a path stands for: a file, a folder, a pattern, or a data set of LLaMA-Factory's `dataset_info.json`.

use super::dataset_info::{self, DataSource};
use crate::{
    identify::{self, Purpose},
    schema::SchemaRequest,
};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Endings of the files that are taken from a folder; each may be followed by that of a compressed file.
const ENDINGS: [&str; 7] = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"];
const COMPRESSED: [&str; 4] = ["gz", "gzip", "zst", "zstd"];
/// Files of a data set's folder that hold no rows.
const NO_ROWS: [&str; 5] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt"];

/// The endings of files and folders that the verbs write beside rows.
const BESIDE_ROWS: [&str; 6] =
    [".removed.jsonl", ".items.jsonl", ".counts.json", ".pairs.jsonl", ".figures.json", ".generate"];

/// Returns the files that `path` stands for, in the order of their names.
///
/// # Errors
/// If a folder or a pattern leads to no file, or the data set cannot be read.
pub(super) fn expand(path: &Path, request: &SchemaRequest) -> Result<Vec<DataSource>> {
    let Some(sources) = dataset_info::sources(path, request)? else { return files(path, request) };
    let mut all = Vec::new();
    for DataSource { path, request } in sources {
        all.extend(files(&path, &request)?);
    }
    Ok(all)
}

fn files(path: &Path, request: &SchemaRequest) -> Result<Vec<DataSource>> {
    let source = |path: PathBuf| DataSource { path, request: request.clone() };
    let text = path.to_string_lossy();
    let paths = if path.is_dir() {
        if identify::is_plain_directory(path) { files_in(path)? } else { Vec::new() }
    } else if !path.exists() && text.contains(['*', '?', '[']) {
        let found = glob::glob(&text).with_context(|| format!("{text}: expected a pattern of file names"))?;
        let found: Vec<PathBuf> = found.flatten().collect();
        let mut files = Vec::new();
        for path in found {
            if path.is_dir() { files.extend(files_in(&path)?) } else { files.push(path) }
        }
        files
    } else {
        vec![path.to_owned()]
    };
    if paths.is_empty() {
        let found = identify::advice(path, Purpose::Rows).map_or(String::new(), |found| format!("; {found}"));
        bail!("{}: expected files with rows, found none{found}", path.display());
    }
    Ok(paths.into_iter().map(source).collect())
}

/// Returns the data files of a folder and of the folders in it, in the order of their names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("{}: cannot be read", folder.display()))? {
        entries.push(entry.with_context(|| format!("{}: cannot be read", folder.display()))?.path());
    }
    entries.sort();
    let mut files = Vec::new();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if name.starts_with('.')
            || NO_ROWS.contains(&name.as_str())
            || BESIDE_ROWS.iter().any(|end| name.ends_with(end))
        {
            continue;
        }
        if path.is_dir() {
            files.extend(files_in(&path)?);
        } else if is_data_file(&name) {
            files.push(path);
        }
    }
    Ok(files)
}

fn is_data_file(name: &str) -> bool {
    let plain =
        name.rsplit_once('.').filter(|(_, ending)| COMPRESSED.contains(ending)).map_or(name, |(plain, _)| plain);
    plain.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&ending))
}
