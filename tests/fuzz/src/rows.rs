//! Fuzzes the dataset reader; the first byte of the input selects the format and the name of the file: `0` to `8` are the
//! formats in JSON, Parquet or Arrow, the last one to be recognized; from `9` on in CSV, from `B` on in TSV, from `K` on
//! in plain text.
#![no_main]

mod input_folder;

use libfuzzer_sys::fuzz_target;
use medqa::{
    data::reader::read_each_row,
    schema::{Format, SchemaRequest},
};
use std::{fs, path::PathBuf, sync::LazyLock};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(input_folder::folder);

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rows)) = bytes.split_first() else { return };
    let formats = [
        Some(Format::Qa),
        Some(Format::PubMedQa),
        Some(Format::Alpaca),
        Some(Format::Messages),
        Some(Format::ShareGpt),
        Some(Format::PromptCompletion),
        Some(Format::MultipleChoice),
        Some(Format::Text),
        None,
    ];
    let choice = usize::from(first.wrapping_sub(b'0'));
    let format = formats[choice % formats.len()];
    let name = ["rows.jsonl", "rows.csv", "rows.tsv", "rows.txt"][choice / formats.len() % 4];
    let file = FOLDER.join(name);
    fs::write(&file, rows).expect("the input can be written");
    let _ = read_each_row(&file, &SchemaRequest { format, ..SchemaRequest::default() });
});
