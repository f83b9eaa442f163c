//! Tables of all keys of DeepSpeed and Accelerate: the kind of value of each key, and how it is handled here.

mod accelerate;
mod deepspeed;
mod typed;
mod zero;

pub(super) use accelerate::ACCELERATE;
pub(super) use deepspeed::DEEPSPEED;

/// One key of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeySpec {
    pub(super) name: &'static str,
    pub(super) kind: ValueKind,
    pub(super) handling: KeyHandling,
}

/// The kind of value of a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum ValueKind {
    /// True or false.
    Flag,
    /// An integer within inclusive bounds; 5e8 counts as one.
    Integer(u64, u64),
    /// A finite number, 0 or above.
    Number,
    /// Two numbers, each at least 0 and below 1.
    Betas,
    /// Text.
    Text,
    /// One of these texts.
    Choice(&'static [&'static str]),
    /// A block with these keys.
    Block(&'static [KeySpec]),
    /// A block `{type, params}`, where the type determines the keys of `params`.
    Typed(&'static TypeTable),
    /// Any value; it is not checked.
    Any,
}

/// The types of a [`ValueKind::Typed`] block.
#[derive(Debug)]
pub(super) struct TypeTable {
    /// The name and the parameters of each supported type.
    pub(super) supported: &'static [(&'static str, &'static [KeySpec])],
    /// The types of DeepSpeed that are not supported, with the reason.
    pub(super) unsupported: &'static [(&'static str, &'static str)],
    /// True if the name is case-insensitive, so that `adamw` means `AdamW`.
    pub(super) case_insensitive: bool,
}

/// How a key is handled.
#[derive(Debug, Clone, Copy)]
pub(super) enum KeyHandling {
    /// The key is read.
    Read,
    /// The key is read and has no default.
    Required,
    /// The key always has this value; another value is reported as not honoured, with what is done instead.
    Fixed(FixedValue, &'static str),
    /// The key is reported as not honoured, with what is done instead, unless it is a block with `enabled: false`.
    NotHonoured(&'static str),
}

/// The only value of a key that is honoured.
#[derive(Debug, Clone, Copy)]
pub(super) enum FixedValue {
    /// True or false.
    Flag(bool),
    /// A number.
    Number(f64),
    /// Text.
    Text(&'static str),
}

pub(super) const NON_NEGATIVE: ValueKind = ValueKind::Integer(0, u64::MAX);
pub(super) const POSITIVE: ValueKind = ValueKind::Integer(1, u64::MAX);
/// The devices of an offload.
const DEVICE: ValueKind = ValueKind::Choice(&["none", "cpu", "nvme"]);
const PYTHON: &str = "it concerns Python's runtime; nothing is done";
const SEGMENTS: &str = "weights are gathered segment by segment";
/// The handling of a cycle of the momentum.
pub(super) const BETA_CYCLE: &str = "the optimizer's betas stay as they are; only the learning rate moves";
/// The handling of a choice between implementations of the optimizer.
pub(super) const ONE_STEP: &str = "there is one implementation of the step";

const fn read(name: &'static str, kind: ValueKind) -> KeySpec {
    KeySpec { name, kind, handling: KeyHandling::Read }
}

const fn required(name: &'static str, kind: ValueKind) -> KeySpec {
    KeySpec { name, kind, handling: KeyHandling::Required }
}

const fn not_honoured(name: &'static str, kind: ValueKind, what: &'static str) -> KeySpec {
    KeySpec { name, kind, handling: KeyHandling::NotHonoured(what) }
}

const fn fixed_flag(name: &'static str, value: bool, what: &'static str) -> KeySpec {
    KeySpec { name, kind: ValueKind::Flag, handling: KeyHandling::Fixed(FixedValue::Flag(value), what) }
}

const fn fixed_number(name: &'static str, value: f64, what: &'static str) -> KeySpec {
    KeySpec { name, kind: ValueKind::Number, handling: KeyHandling::Fixed(FixedValue::Number(value), what) }
}
