//! Datasets: reading rows from files, encoding them as examples, and sampling the batches of a run.

mod answer;
mod batch_sampler;
pub mod check;
mod choices;
mod columnar_rows;
pub mod content;
mod conversation;
mod csv_rows;
mod dataset_info;
mod encode;
mod json_rows;
mod json_scanner;
mod location;
mod mapped_object;
mod order;
pub mod reader;
mod recognize;
mod sources;
#[cfg(test)]
mod test_tokenizers;
mod text;
mod text_rows;
mod thought;

pub use batch_sampler::{BatchSampler, GlobalBatch};
pub use content::{Conversation, RowContent, pubmedqa_prompt};
pub use conversation::{AnswerTokens, EncodedConversation, answer_tokens};
pub use csv_rows::JSON_COLUMN;
pub use encode::{EncodeOptions, EncodedRows, encode_row, encode_rows};
pub use location::{RowLocation, RowPlace};
pub use order::RowIndex;
pub use reader::{DataRow, Row, RowReader, read_rows};
