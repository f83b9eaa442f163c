//! Fuzzes the dataset reader; the first byte of the input selects the format and the name of the file: `0` to `4` are the
//! formats in JSON or Parquet, `5` to `9` in CSV, `:` to `>` in TSV.
#![no_main]

mod input_folder;

use libfuzzer_sys::fuzz_target;
use medqa::{
    data::reader::read_each_row,
    schema::{Format, Schema},
};
use std::{fs, path::PathBuf, sync::LazyLock};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(input_folder::folder);

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rows)) = bytes.split_first() else { return };
    let formats = [Format::Qa, Format::PubMedQa, Format::Alpaca, Format::Messages, Format::ShareGpt];
    let choice = usize::from(first.wrapping_sub(b'0'));
    let format = formats[choice % formats.len()];
    let name = ["rows.jsonl", "rows.csv", "rows.tsv"][choice / formats.len() % 3];
    let file = FOLDER.join(name);
    fs::write(&file, rows).expect("the input can be written");
    let _ = read_each_row(&file, &Schema { format, ..Schema::default() });
});
