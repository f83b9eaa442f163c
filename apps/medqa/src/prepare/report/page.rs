//! The HTML page, which has no links to other places.

use super::{histogram, statistics::Statistics};
use anyhow::Result;
use serde_json::Value;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
    h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}\
    table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}\
    td.n{text-align:right;font-variant-numeric:tabular-nums}\
    pre{white-space:pre-wrap;background:#f6f6f6;padding:.8em;max-height:24em;overflow:auto}svg{max-width:100%}";

/// Writes the page.
///
/// # Errors
/// If a plot cannot be drawn.
pub(super) fn html(figures: &Value, statistics: &Statistics) -> Result<String> {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Rows</title><style>{STYLE}</style></head>\
         <body>\n<h1>{} rows</h1>\n",
        statistics.rows
    );
    for (name, value) in figures.as_object().into_iter().flatten().filter(|(name, _)| *name != "rows") {
        let plot = match name.as_str() {
            "characters of questions" => Some((&statistics.question_chars, "characters of a question")),
            "characters of answers" => Some((&statistics.answer_chars, "characters of an answer")),
            "tokens" => Some((&statistics.tokens, "tokens of a row")),
            _ => None,
        };
        let empty = value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
        if empty {
            continue;
        }
        page.push_str(&format!("<h2>{}</h2>\n{}", escaped(&capital(name)), table(value)));
        if let Some((lengths, unit)) = plot {
            page.push_str(&histogram::svg(lengths, unit)?);
        }
    }
    page.push_str("<h2>Examples</h2>\n");
    for (language, rows) in &statistics.shown {
        page.push_str(&format!("<h3>{}</h3>\n", escaped(language)));
        for (_, row) in rows {
            let text = serde_json::to_string_pretty(row)?;
            page.push_str(&format!("<pre>{}</pre>\n", escaped(&text)));
        }
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

fn table(value: &Value) -> String {
    let Some(fields) = value.as_object() else { return format!("<p>{}</p>\n", escaped(&shown(value))) };
    let row = |(name, value): (&String, &Value)| {
        format!("<tr><td>{}</td><td class=\"n\">{}</td></tr>\n", escaped(name), escaped(&shown(value)))
    };
    format!("<table>\n{}</table>\n", fields.iter().map(row).collect::<String>())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "not counted".to_owned(),
        Value::Number(number) if number.is_f64() => format!("{:.3}", number.as_f64().unwrap_or(0.0)),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn capital(name: &str) -> String {
    let mut chars = name.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
