//! Filters that return a generator in Jinja2: it can be read once, has no length and is no JSON.

use minijinja::value::Value;
use minijinja::{Environment, Error, State, filters};

use super::arguments::{Arguments, Others};

/// Adds the filters to an environment, in place of the engine's of the same names, which return lists.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("map", |state: &mut State, value: Value, others: Others| {
        filters::map(state, value, others).map(generator)
    });
    environment.add_filter("select", |state: &mut State, value: Value, test: Option<String>, others: Others| {
        filters::select(state, value, test.map(Into::into), others).map(generator)
    });
    environment.add_filter("reject", |state: &mut State, value: Value, test: Option<String>, others: Others| {
        filters::reject(state, value, test.map(Into::into), others).map(generator)
    });
    environment.add_filter("selectattr", selectattr);
    environment.add_filter("rejectattr", rejectattr);
    environment.add_filter("unique", unique);
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        items(&filters::batch(state, value, count, fill)?)
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        items(&filters::slice(state, value, count, fill)?)
    });
}

fn selectattr(
    state: &mut State,
    value: Value,
    attribute: String,
    test: Option<String>,
    others: Others,
) -> Result<Value, Error> {
    filters::selectattr(state, value, attribute.into(), test.map(Into::into), others).map(generator)
}

fn rejectattr(
    state: &mut State,
    value: Value,
    attribute: String,
    test: Option<String>,
    others: Others,
) -> Result<Value, Error> {
    filters::rejectattr(state, value, attribute.into(), test.map(Into::into), others).map(generator)
}

fn unique(state: &State, value: Value, others: Others) -> Result<Value, Error> {
    let arguments = Arguments::bind("unique", ["case_sensitive", "attribute"], &others.into_values())?;
    items(&filters::unique(state, value, arguments.keywords())?)
}

/// Returns the items of a list as a generator.
fn items(list: &Value) -> Result<Value, Error> {
    Ok(generator(list.try_iter()?.collect()))
}

/// Returns a generator of items.
fn generator(items: Vec<Value>) -> Value {
    // A filter takes out the length that the iterator of a list has.
    Value::make_one_shot_iterator(items.into_iter().filter(|_| true))
}
