use super::*;

fn rows(text: &str, format: Format) -> Result<Vec<Row>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    read_rows(file.path(), &Schema { format, ..Schema::default() }.into())
}

#[test]
fn mistakes_name_the_line_and_the_key() {
    let item = "{\"7\":{\"QUESTION\":\"q\",\"CONTEXTS\":[],\"final_decision\":\"perhaps\"}}";
    for (text, format, words) in [
        ("{\"question\":\"a\",\"answer\":\"b\"}\n\n{\"question\":1}", Format::Qa, ":3: `question`"),
        ("[{\"question\":\"a\",\"answer\":\"b\"},\n3]", Format::Qa, ": row 2: expected an object, found 3"),
        ("{\"question\":\"a\"}", Format::Qa, ":1: expected the key `answer`, found question"),
        ("", Format::Qa, "at least one row"),
        ("[]", Format::Qa, "at least one row"),
        ("[{]", Format::Messages, ": expected JSON: "),
        ("[{\"question\":\"a\",\"answer\":\"b\"}", Format::Qa, "row 2: expected JSON: EOF"),
        (
            "[{\"question\":\"a\",\"answer\":\"b\"},]",
            Format::Qa,
            "row 2: expected JSON: expected a value after a comma",
        ),
        ("[{\"question\":\"a\",\"answer\":\"b\"}] x", Format::Qa, "row 2: expected JSON: trailing characters"),
        ("[{\"question\":\"a\",\"answer\":\"b\"} {}]", Format::Qa, "row 2: expected JSON: expected `,` or `]`"),
        ("[1]", Format::PubMedQa, "an object of items"),
        (item, Format::PubMedQa, ": 7: `final_decision`: expected yes, no or maybe, found \"perhaps\""),
    ] {
        let error = format!("{:#}", rows(text, format).unwrap_err());
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn rows_keep_the_order_of_the_file() {
    let item = "{\"QUESTION\":\"q\",\"CONTEXTS\":[\"a\",\"b\"],\"final_decision\":\"yes\"}";
    let found = rows(&format!("{{\"9\":{item},\"1\":{item}}}"), Format::PubMedQa).unwrap();
    let places: Vec<_> = found.iter().map(|row| row.location.place.to_string()).collect();
    assert_eq!(places, ["9", "1"]);
    let (line, array) = ("{\"question\":\"a\",\"answer\":\"b\"}", "[{\"question\":\"a\",\"answer\":\"b\"}]");
    let (line, array) = (rows(&format!("\u{feff}{line}\n"), Format::Qa), rows(array, Format::Qa));
    assert_eq!(line.unwrap()[0].content, array.unwrap()[0].content);
}

/// Reads rows without naming a format.
fn recognized(name: &str, text: &str) -> Vec<Row> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    read_rows(&file, &SchemaRequest::default()).unwrap_or_else(|error| panic!("{text}: {error:#}"))
}

#[test]
fn the_format_is_recognized_by_the_keys_of_the_rows() {
    let expected = recognized("a.jsonl", "{\"question\":\"q\",\"answer\":\"a\"}");
    let turns = "[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":\"a\"}]";
    let shared = "[{\"from\":\"human\",\"value\":\"q\"},{\"from\":\"gpt\",\"value\":\"a\"}]";
    for text in [
        "{\"instruction\":\"q\",\"input\":\"\",\"output\":\"a\"}",
        "{\"prompt\":\"q\",\"completion\":\"a\"}",
        "{\"prompt\":\"q\",\"response\":\"a\"}",
        "{\"Question\":\"q\",\"Answer\":\"a\"}",
        "{\"data\": [{\"question\":\"q\",\"answer\":\"a\"}]}",
    ] {
        assert_eq!(recognized("a.json", text)[0].content, expected[0].content, "{text}");
    }
    assert_eq!(recognized("a.txt", "question,answer\nq,a\n")[0].content, expected[0].content, "CSV by its header");
    let conversation = recognized("a.jsonl", &format!("{{\"messages\":{turns}}}"));
    for text in [
        format!("{{\"conversations\":{shared}}}"),
        format!("{{\"conversations\":{turns}}}"),
        format!("{{\"messages\":{shared}}}"),
    ] {
        assert_eq!(recognized("a.jsonl", &text)[0].content, conversation[0].content, "{text}");
    }
    let texts = recognized("a.txt", "One.\nTwo.\n\n\nThree.\n");
    let found: Vec<_> = texts.iter().map(|row| (row.location.place.to_string(), row.content.clone())).collect();
    let text = |text: &str| RowContent::Text(text.to_owned());
    assert_eq!(found, [("line 1".to_owned(), text("One.\nTwo.")), ("line 5".to_owned(), text("Three."))]);
}
