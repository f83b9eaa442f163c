//! Fuzzes the GGUF reader: configuration, tokenizer and every tensor.
#![no_main]

mod input_folder;

use burn_llama::{Checkpoint, Tokenizer};
use libfuzzer_sys::fuzz_target;
use std::{fs, path::PathBuf, sync::LazyLock};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| input_folder::folder().join("model.gguf"));

fuzz_target!(|bytes: &[u8]| {
    fs::write(&*FILE, bytes).expect("the input can be written");
    let Ok(gguf) = burn_llama::checkpoint::gguf::Gguf::open(&FILE) else { return };
    let _ = Checkpoint::open(&FILE);
    let _ = Tokenizer::from_gguf(&gguf);
    for entry in gguf.tensors().filter(|entry| entry.num_bytes() <= bytes.len()) {
        let _ = gguf.read(entry);
    }
});
