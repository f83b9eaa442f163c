//! Every key that DeepSpeed and Accelerate know: its kind, and what becomes of it here.

mod accelerate;
mod deepspeed;
mod typed;
mod zero;

pub(super) use accelerate::ACCELERATE;
pub(super) use deepspeed::DEEPSPEED;

/// One key of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) usage: Usage,
}

/// What may stand at a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// True or false.
    Flag,
    /// A whole number within bounds; 5e8 is one.
    Whole(u64, u64),
    /// A finite number, 0 or above.
    Number,
    /// Two numbers from 0 to below 1.
    Betas,
    /// Text.
    Text,
    /// One of these.
    Choice(&'static [&'static str]),
    /// A block with these keys.
    Block(&'static [Key]),
    /// `{type, params}`; the type decides which keys `params` has.
    Typed(&'static Types),
    /// Anything; nobody looks inside.
    Any,
}

/// The types of a [`Kind::Typed`] block.
#[derive(Debug)]
pub(super) struct Types {
    /// Each type's name and parameters.
    pub(super) known: &'static [(&'static str, &'static [Key])],
    /// Types that DeepSpeed has and we have not, and why.
    pub(super) refused: &'static [(&'static str, &'static str)],
    /// Whether `adamw` is `AdamW`.
    pub(super) any_case: bool,
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Usage {
    /// It is read.
    Read,
    /// It is read and has no default.
    Need,
    /// We always act as if this value stood there; another one is noted, with what we do.
    Fixed(Fixed, &'static str),
    /// It is noted, with what we do instead, unless it is a block with `enabled: false`.
    Instead(&'static str),
}

/// A value that we always act by.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fixed {
    /// True or false.
    Flag(bool),
    /// A number.
    Number(f64),
    /// Text.
    Text(&'static str),
}

pub(super) const COUNT: Kind = Kind::Whole(0, u64::MAX);
pub(super) const POSITIVE: Kind = Kind::Whole(1, u64::MAX);

const fn read(name: &'static str, kind: Kind) -> Key {
    Key { name, kind, usage: Usage::Read }
}

const fn need(name: &'static str, kind: Kind) -> Key {
    Key { name, kind, usage: Usage::Need }
}

const fn instead(name: &'static str, kind: Kind, what: &'static str) -> Key {
    Key { name, kind, usage: Usage::Instead(what) }
}

const fn flag(name: &'static str, value: bool, what: &'static str) -> Key {
    Key { name, kind: Kind::Flag, usage: Usage::Fixed(Fixed::Flag(value), what) }
}

const fn number(name: &'static str, value: f64, what: &'static str) -> Key {
    Key { name, kind: Kind::Number, usage: Usage::Fixed(Fixed::Number(value), what) }
}
