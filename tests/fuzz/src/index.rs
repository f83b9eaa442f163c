//! Fuzzes the reader of sharded checkpoints: the input is an index, a zero byte, and the start of a shard.
#![no_main]

mod input_folder;

use burn::{backend::Flex, tensor::DType};
use burn_llama::Checkpoint;
use libfuzzer_sys::fuzz_target;
use std::{fs, path::PathBuf, sync::LazyLock};

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-5}"#;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = input_folder::folder();
    fs::write(folder.join("config.json"), CONFIG).expect("the configuration can be written");
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (index, shard) = bytes.split_at(end);
    fs::write(FOLDER.join("model.safetensors.index.json"), index).expect("the input can be written");
    fs::write(FOLDER.join("model-1.safetensors"), shard.get(1..).unwrap_or_default())
        .expect("the input can be written");
    if let Ok(checkpoint) = Checkpoint::open(&FOLDER) {
        let _ = checkpoint.load::<Flex>(DType::F32, &Default::default());
    }
});
