//! Filters of Jinja2 that the engine lacks, or that take other arguments there.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};

use super::arguments::{Arguments, Others};
use super::json::tojson;
use super::source::PERCENT_FILTER;
use super::{generators, repr, text};

/// Adds the filters to an environment, in place of the engine's of the same names.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("tojson", tojson);
    environment.add_filter(PERCENT_FILTER, percent_format);
    environment.add_filter("string", |value: &Value| repr::str(value));
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("sort", sort);
    environment.add_filter("dictsort", dictsort);
    generators::add(environment);
    // The engine's writes one item on each line, Python's fills the lines.
    environment.remove_filter("pprint");
}

/// Implements the operator `%` of a string. The operand is a tuple of values, a mapping, or one value.
fn percent_format(pattern: &str, operand: &Value) -> Result<String, Error> {
    let values: Vec<Value> = match operand.kind() {
        _ if operand.is_tuple() => operand.try_iter()?.collect(),
        ValueKind::Map if pattern.contains("%(") => {
            let keys = operand.try_iter()?.map(|key| Ok((key.to_string(), operand.get_item(&key)?)));
            vec![Value::from(keys.collect::<Result<Kwargs, Error>>()?)]
        }
        _ => vec![operand.clone()],
    };
    let texts: Vec<Value> = values.into_iter().map(as_printed).collect();
    format(FormatStyle::Printf, pattern, &texts)
}

/// Replaces a list or mapping by its text, in which the engine writes floats otherwise.
fn as_printed(value: Value) -> Value {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => Value::from(repr::str(&value)),
        ValueKind::Map if !value.is_kwargs() => Value::from(repr::str(&value)),
        _ => value,
    }
}

fn default(value: &Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("default", ["default_value", "boolean"], &others.into_values())?;
    let replaced = value.is_undefined() || (arguments.flag(1) && !value.is_true());
    let other =
        if replaced { arguments.required(0).cloned().unwrap_or_else(|_| Value::from("")) } else { value.clone() };
    Ok(other)
}

/// Implements `int`: a text that is no number gives the default, 0 unless said.
fn int(state: &State, value: &Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("int", ["default", "base"], &others.into_values())?;
    let other = arguments.get(0).cloned().unwrap_or_else(|| Value::from(0));
    let base = arguments.integer(1)?.map(|base| u32::try_from(base).map_err(|_| arguments.wrong(1, "a base")));
    let trimmed = value.as_str().map_or_else(|| value.clone(), |text| Value::from(text.trim_matches(text::is_space)));
    filters::int(state, &trimmed, Some(other), base.transpose()?, no_keywords())
}

/// Implements `float`: a text that is no number gives the default, 0.0 unless said.
fn float(state: &State, value: &Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("float", ["default"], &others.into_values())?;
    let other = arguments.get(0).cloned().unwrap_or_else(|| Value::from(0.0));
    let trimmed = value.as_str().map_or_else(|| value.clone(), |text| Value::from(text.trim_matches(text::is_space)));
    filters::float(state, &trimmed, Some(other), no_keywords())
}

/// Returns the keywords of a call without any.
fn no_keywords() -> Kwargs {
    Kwargs::from_iter::<[(&str, Value); 0]>([])
}

fn indent(value: &Value, others: Others) -> Result<String, Error> {
    let text = value.as_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("indent: the value must be a string, not {}", value.kind()))
    })?;
    let arguments = Arguments::bind("indent", ["width", "first", "blank"], &others.into_values())?;
    let indent = match arguments.get(0).map(Value::as_str) {
        Some(Some(indent)) => indent.to_owned(),
        _ => " ".repeat(usize::try_from(arguments.integer(0)?.unwrap_or(4)).unwrap_or(0)),
    };
    Ok(text::indented(text, &indent, arguments.flag(1), arguments.flag(2)))
}

fn truncate(state: &mut State, value: &Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("truncate", ["length", "killwords", "end", "leeway"], &others.into_values())?;
    minijinja_contrib::filters::truncate(state, value, arguments.keywords())
}

fn sort(state: &State, value: Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("sort", ["reverse", "case_sensitive", "attribute"], &others.into_values())?;
    filters::sort(state, value, arguments.keywords())
}

fn dictsort(value: &Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("dictsort", ["case_sensitive", "by", "reverse"], &others.into_values())?;
    filters::dictsort(value, arguments.keywords())
}
