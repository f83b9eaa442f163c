//! Rows of data, from files to examples.

pub mod check;
pub mod content;
mod conversation;
mod encode;
mod order;
mod plan;
pub mod schema;
pub mod source;

pub use content::{Content, pubmedqa_prompt};
pub use conversation::answer_tokens;
pub use encode::{Encoded, encode, examples};
pub use plan::{Plan, Step};
pub use schema::{Columns, Format, Schema};
pub use source::{Row, read};
