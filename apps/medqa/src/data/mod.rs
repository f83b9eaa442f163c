//! Rows of data, from files to examples.

mod encode;
mod order;
pub mod source;

pub use encode::{Encoded, encode};
pub use order::epoch_order;
pub use source::{Format, Row, pubmedqa_prompt, read};
