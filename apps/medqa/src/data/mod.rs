//! Datasets: reading rows from files, encoding them as examples, and sampling the batches of a run.

mod answer;
mod batch_sampler;
pub mod check;
pub mod content;
mod conversation;
mod csv_rows;
mod encode;
mod json_rows;
mod location;
mod order;
mod parquet_rows;
pub mod reader;
#[cfg(test)]
mod test_tokenizers;
mod text;
mod thought;

pub use batch_sampler::{BatchSampler, GlobalBatch};
pub use content::{Conversation, RowContent, pubmedqa_prompt};
pub use conversation::{AnswerTokens, EncodedConversation, answer_tokens};
pub use encode::{EncodeOptions, EncodedRows, encode_row, encode_rows};
pub use location::RowLocation;
pub use order::RowIndex;
pub use reader::{Row, read_rows};
