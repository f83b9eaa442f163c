//! Refusals of a recipe's values.

use std::fmt::Display;

/// The key and what is wrong with its value.
pub(super) type InvalidValue = (&'static str, String);

/// Refuses a count of 0.
pub(super) fn ensure_positive(key: &'static str, count: Option<usize>) -> Result<(), InvalidValue> {
    ensure(key, count != Some(0), "a positive integer", 0)
}

/// Refuses an empty text.
pub(super) fn ensure_given(key: &'static str, text: &str, expected: &str) -> Result<(), InvalidValue> {
    ensure(key, !text.trim().is_empty(), expected, "nothing")
}

/// Refuses the value of a key unless the condition `holds`, by what was expected and found.
pub(super) fn ensure(key: &'static str, holds: bool, expected: &str, found: impl Display) -> Result<(), InvalidValue> {
    if holds { Ok(()) } else { Err((key, format!("expected {expected}, found {found}"))) }
}
