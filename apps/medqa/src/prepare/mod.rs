//! The verbs of `medqa data`: they turn the rows that people have into rows worth training on.
//!
//! Every verb reads rows of every kind of file, one at a time, works in parallel with the same result for any number of
//! threads, writes beside its output and renames, and keeps what it takes out with the reason.

mod agreement;
mod assign;
mod clean;
mod columns;
mod convert;
mod decontaminate;
mod dedup;
mod groups;
mod mix;
mod output;
mod report;
mod sequence;
mod split;
mod texts;
mod units;
mod verbs;
mod writer;

pub(crate) use assign::{SplitPart, SplitShares};
pub(crate) use groups::{Fingerprint, Nearness};
pub(crate) use verbs::{DataVerb, data};
