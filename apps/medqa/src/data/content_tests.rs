use super::*;
use crate::schema::Columns;
use serde_json::json;

fn read(format: Format, columns: &str, value: Value) -> Result<RowContent> {
    let columns = if columns.is_empty() { Columns::default() } else { columns.parse().unwrap() };
    parse_row(value.as_object().unwrap(), &Schema { format, columns })
}

fn turns(list: &[(&str, &str)]) -> Vec<Turn> {
    list.iter().map(|(role, content)| Turn { message: Message::new(*role, *content), learned: true }).collect()
}

fn conversation(list: &[(&str, &str)]) -> RowContent {
    RowContent::Conversation(turns(list).into())
}

fn answer(prompt: &[(&str, &str)], answer: &str) -> RowContent {
    RowContent::Answer {
        prompt: turns(prompt).into_iter().map(|turn| turn.message).collect(),
        answer: answer.to_owned(),
    }
}

#[test]
fn each_format_says_the_same_thing_in_its_own_way() {
    for (format, columns, value, expected) in [
        (Format::Qa, "", json!({"question": "q", "answer": "a", "source": 3}), answer(&[("user", "q")], "a")),
        (Format::Qa, "question=Q,answer=A", json!({"Q": "q", "A": "a", "answer": 1}), answer(&[("user", "q")], "a")),
        (Format::Alpaca, "", json!({"instruction": "i", "input": "", "output": "o"}), answer(&[("user", "i")], "o")),
        (Format::Alpaca, "", json!({"instruction": "", "input": "x", "output": "o"}), answer(&[("user", "x")], "o")),
        (
            Format::Alpaca,
            "output=reply",
            json!({"instruction": "i", "input": "x", "reply": "o", "system": "s", "history": []}),
            answer(&[("system", "s"), ("user", "i\nx")], "o"),
        ),
        (
            Format::Alpaca,
            "",
            json!({"instruction": "i", "input": null, "output": "o", "history": [["a", "b"]]}),
            conversation(&[("user", "a"), ("assistant", "b"), ("user", "i"), ("assistant", "o")]),
        ),
        (
            Format::Messages,
            "",
            json!({"messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
                {"role": "assistant", "content": "a", "weight": null},
            ], "tools": null}),
            conversation(&[("system", "s"), ("user", "uv"), ("assistant", "a")]),
        ),
        (
            Format::Messages,
            "messages=chat,role=who,content=what",
            json!({"chat": [{"who": "user", "what": "u"}]}),
            conversation(&[("user", "u")]),
        ),
        (
            Format::ShareGpt,
            "",
            json!({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}),
            conversation(&[("user", "u"), ("assistant", "a")]),
        ),
    ] {
        assert_eq!(read(format, columns, value.clone()).unwrap(), expected, "{value}");
    }
}

#[test]
fn a_system_prompt_beside_the_conversation_comes_first_and_weight_0_is_not_learned() {
    let row =
        json!({"system": "s", "conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a"}]});
    let RowContent::Conversation(found) = read(Format::ShareGpt, "", row).unwrap() else { panic!("a conversation") };
    assert_eq!(
        found.turns.iter().map(|turn| turn.message.role.as_str()).collect::<Vec<_>>(),
        ["system", "user", "assistant"]
    );
    let row = json!({"messages": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1}]});
    let RowContent::Conversation(found) = read(Format::Messages, "", row).unwrap() else { panic!("a conversation") };
    assert_eq!(found.turns.iter().map(|turn| turn.learned).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn every_key_of_a_turn_and_the_tools_of_a_row_are_kept() {
    let call = json!([{"id": "c1", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": null}"}}]);
    let row = |tools: Value| {
        json!({"messages": [
            {"role": "user", "name": "Ann", "content": "u", "seen": null},
            {"role": "assistant", "content": null, "tool_calls": call.clone(), "train": true},
            {"role": "tool", "content": "r", "tool_call_id": "c1", "training": false},
        ], "tools": tools})
    };
    let tool = json!({"type": "function", "function": {"name": "f"}});
    for (row, expected) in [
        (row(Value::Null), None),
        (row(json!([])), None),
        (row(json!([tool])), Some(json!([tool]))),
        (row(json!(json!([tool]).to_string())), Some(json!([tool]))),
        (json!({"messages": row(Value::Null)["messages"], "functions": [{"name": "f"}]}), Some(json!([tool]))),
    ] {
        let RowContent::Conversation(found) = read(Format::Messages, "", row.clone()).unwrap() else { panic!("{row}") };
        assert_eq!(found.tools, expected, "{row}");
        assert_eq!(found.turns.iter().map(|turn| turn.learned).collect::<Vec<_>>(), [true, true, false]);
        let fields: Vec<Value> = found.turns.iter().map(|turn| turn.message.fields.clone().into()).collect();
        assert_eq!(
            json!(fields).to_string(),
            json!([{"name": "Ann", "seen": null}, {"tool_calls": call}, {"tool_call_id": "c1"}]).to_string()
        );
        assert_eq!(found.turns[1].message.content, None);
    }
}

#[test]
fn mistakes_name_the_key_what_was_expected_and_what_was_found() {
    let message = |message: Value| json!({"messages": [{"role": "user", "content": "u"}, message]});
    for (format, columns, value, words) in [
        (Format::Qa, "", json!({}), "expected the key `question`, found none"),
        (
            Format::Qa,
            "answer=reply",
            json!({"question": "q", "answer": "a"}),
            "expected the key `reply`, found question, answer",
        ),
        (Format::Alpaca, "", json!({"instruction": "i", "output": 1}), "`output`: expected a string, found 1"),
        (
            Format::Alpaca,
            "",
            json!({"instruction": "i", "output": "o", "history": [["a"]]}),
            "`history`: expected a list of [prompt, answer], found [\"a\"]",
        ),
        (Format::Messages, "", json!({"messages": "hi"}), "`messages`: expected a list, found \"hi\""),
        (Format::Messages, "", message(json!("hi")), "turn 2: expected an object, found \"hi\""),
        (
            Format::Messages,
            "",
            message(json!({"role": "bot", "content": "x"})),
            "turn 2: `role`: expected system, developer, user, assistant or tool, found \"bot\"",
        ),
        (
            Format::Messages,
            "",
            message(json!({"role": "assistant", "content": null})),
            "turn 2: `content`: expected a string, found null",
        ),
        (
            Format::Messages,
            "",
            message(json!({"role": "assistant", "content": null, "tool_calls": []})),
            "turn 2: `content`: expected a string, found null",
        ),
        (
            Format::Messages,
            "",
            message(json!({"role": "assistant", "content": "x", "train": "no"})),
            "turn 2: `train`: expected true or false, found \"no\"",
        ),
        (
            Format::Messages,
            "",
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "turn 2: `content`: expected a string, or a list of parts of the type text, found {\"type\":\"image_url\"}",
        ),
        (
            Format::Messages,
            "",
            message(json!({"role": "assistant", "content": "x", "weight": 0.5})),
            "`weight`: expected 0 or 1",
        ),
        (
            Format::ShareGpt,
            "",
            json!({"conversations": [{"from": "function_call", "value": "x"}]}),
            "turn 1: `from`: expected system, human, user, gpt",
        ),
        (Format::ShareGpt, "", json!({"conversations": [], "tools": "[1]"}), "`tools`: expected a list of objects"),
        (
            Format::Qa,
            "",
            json!({"question": ["long".repeat(99)], "answer": ""}),
            "`question`: expected a string, found [\"longlong",
        ),
    ] {
        let error = format!("{:#}", read(format, columns, value.clone()).unwrap_err());
        assert!(error.contains(words) && error.len() < 200, "{value}: {error}");
    }
}

#[test]
fn the_prompt_of_pubmedqa_is_the_harness_s() {
    assert_eq!(pubmedqa_prompt("q", &["a".into(), "b".into()]), "Abstract: a\nb\nQuestion: q\nAnswer:");
}
