//! Fuzzes the dataset reader; the first byte of the input selects the format.
#![no_main]

mod input_folder;

use libfuzzer_sys::fuzz_target;
use medqa::{
    data::reader::read_each_row,
    schema::{Format, Schema},
};
use std::{fs, path::PathBuf, sync::LazyLock};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| input_folder::folder().join("rows.jsonl"));

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rows)) = bytes.split_first() else { return };
    let formats = [Format::Qa, Format::PubMedQa, Format::Alpaca, Format::Messages, Format::ShareGpt];
    let format = formats[usize::from(*first) % formats.len()];
    fs::write(&*FILE, rows).expect("the input can be written");
    let _ = read_each_row(&FILE, &Schema { format, ..Schema::default() });
});
