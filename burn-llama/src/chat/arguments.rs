//! Arguments of a call in a template, bound to the names of parameters as Python does.

use minijinja::value::{Kwargs, Rest, Value, ValueOrKwargs};
use minijinja::{Error, ErrorKind};

/// The arguments of a filter after the value.
pub(super) type Others = Rest<ValueOrKwargs>;

/// The arguments of a call, one value for each of `N` parameters.
pub(super) struct Arguments<const N: usize> {
    function: String,
    names: [&'static str; N],
    values: [Option<Value>; N],
}

impl<const N: usize> Arguments<N> {
    /// Binds positional and keyword arguments to the names of the parameters.
    ///
    /// # Errors
    ///
    /// Too many arguments, a keyword that is no parameter, or a parameter that is given twice.
    pub(super) fn bind(function: &str, names: [&'static str; N], arguments: &[Value]) -> Result<Self, Error> {
        let refused = |message: String| Error::new(ErrorKind::InvalidOperation, format!("{function} {message}"));
        let (positional, keywords) = match arguments.split_last() {
            Some((last, rest)) if last.is_kwargs() => (rest, Some(Kwargs::try_from(last.clone())?)),
            _ => (arguments, None),
        };
        if positional.len() > N {
            return Err(refused(format!("takes at most {N} arguments, not {}", positional.len())));
        }
        let mut values = std::array::from_fn(|index| positional.get(index).cloned());
        for keyword in keywords.iter().flat_map(Kwargs::args) {
            let Some(index) = names.iter().position(|name| *name == keyword) else {
                return Err(refused(format!("has no parameter {keyword}; it takes {}", names.join(", "))));
            };
            let value = keywords.as_ref().map(|keywords| keywords.peek(keyword)).transpose()?;
            if values[index].is_some() {
                return Err(refused(format!("was given {keyword} twice")));
            }
            values[index] = value;
        }
        Ok(Self { function: function.to_owned(), names, values })
    }

    /// Returns an argument; `None` if it was left out or is none.
    pub(super) fn get(&self, index: usize) -> Option<&Value> {
        self.values[index].as_ref().filter(|value| !value.is_none())
    }

    /// Returns an argument that must be there.
    pub(super) fn required(&self, index: usize) -> Result<&Value, Error> {
        self.values[index].as_ref().ok_or_else(|| {
            let message = format!("{} needs the argument {}", self.function, self.names[index]);
            Error::new(ErrorKind::MissingArgument, message)
        })
    }

    /// Returns a string that must be there.
    pub(super) fn text(&self, index: usize) -> Result<&str, Error> {
        let value = self.required(index)?;
        value.as_str().ok_or_else(|| self.wrong(index, "a string"))
    }

    /// Returns a string, or `None`.
    pub(super) fn optional_text(&self, index: usize) -> Result<Option<&str>, Error> {
        self.get(index).map(|_| self.text(index)).transpose()
    }

    /// Returns an integer, or `None`.
    pub(super) fn integer(&self, index: usize) -> Result<Option<i64>, Error> {
        let number = |value: &Value| i64::try_from(value.clone()).map_err(|_| self.wrong(index, "an integer"));
        self.get(index).map(number).transpose()
    }

    /// Returns true if the argument is there and true.
    pub(super) fn flag(&self, index: usize) -> bool {
        self.get(index).is_some_and(Value::is_true)
    }

    /// Returns the arguments in order, up to the last that was given, for a function that takes them by position.
    pub(super) fn positional(self) -> Vec<Value> {
        let given = self.values.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.values.into_iter().take(given).map(Option::unwrap_or_default).collect()
    }

    /// Returns the arguments that were given as keywords, for a function that takes them so.
    pub(super) fn keywords(self) -> Kwargs {
        let pairs = self.names.into_iter().zip(self.values);
        pairs.filter_map(|(name, value)| value.map(|value| (name, value))).collect()
    }

    /// Returns the error for an argument of another kind than `expected`.
    pub(super) fn wrong(&self, index: usize, expected: &str) -> Error {
        let found = self.values[index].as_ref().map_or("nothing".to_owned(), |value| value.kind().to_string());
        let message = format!("{}: {} must be {expected}, not {found}", self.function, self.names[index]);
        Error::new(ErrorKind::InvalidOperation, message)
    }
}
