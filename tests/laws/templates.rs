//! Jinja as chat templates use it equals that of `transformers`: expressions, statements and white space. The fixture is
//! written by `tests/fixtures/make_templates.py`.

use burn_llama::{ChatTemplate, Error};
use laws::fixture;
use serde_json::Value;

fn render(template: &Value, context: &Value) -> Result<String, Error> {
    ChatTemplate::new(template.as_str().unwrap(), None, None)?.render_context(context)
}

fn expressions() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("jinja/expressions.json")).unwrap()).unwrap()
}

#[test]
fn expressions_print_what_jinja2_prints_and_fail_where_it_fails() {
    let file = expressions();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 700);
    let mut differ = Vec::new();
    for case in cases {
        let found = render(&case["template"], &file["context"]);
        if found.as_deref().ok() != case["text"].as_str() {
            differ.push(format!("{}\n  expected {}\n  found {found:?}", case["template"], case["text"]));
        }
    }
    assert!(differ.is_empty(), "{} differ:\n{}", differ.len(), differ.join("\n"));
}

#[test]
fn a_method_that_is_missing_is_named() {
    let file = expressions();
    for case in file["not_here"].as_array().unwrap() {
        let refused = render(&case["template"], &file["context"]).unwrap_err().to_string();
        assert!(refused.contains(case["names"].as_str().unwrap()), "{}: {refused}", case["template"]);
    }
}

#[test]
fn every_text_of_a_template_has_the_same_time() {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y, %H:%M:%S') }}", None, None).unwrap();
    let now = template.render_context(&Value::Null).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(template.render_context(&Value::Null).unwrap(), now);
    // The time that is kept with a run gives the same text again.
    let time = template.time();
    let later = ChatTemplate::new(template.source(), None, None).unwrap().with_time(&time).unwrap();
    assert_eq!((later.render_context(&Value::Null).unwrap(), later.time()), (now, time));
    let fixed = later.with_time("2024-02-29T23:59:59").unwrap();
    assert_eq!(fixed.render_context(&Value::Null).unwrap(), "29 Feb 2024, 23:59:59");
    assert!(fixed.with_time("yesterday").unwrap_err().to_string().contains("yesterday"));
}
