//! The syntax of a ds_config: Hjson, as DeepSpeed reads it.

use super::*;

const PLAIN: &str = r#"{
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": true,
        "offload_optimizer": { "device": "nvme", "nvme_path": "/local #1/it's \"fast\" \u00e9" }
    },
    "optimizer": { "type": "AdamW", "params": { "lr": 3e-5, "betas": [0.8, 0.99], "weight_decay": 0 } },
    "bf16": { "enabled": true },
    "steps_per_print": null
}"#;

/// The same configuration, with everything that Hjson allows.
const HJSON: &str = r#"# a comment
// another { comment: "
/* a third,
   over two lines */
{
    train_micro_batch_size_per_gpu: 2 // per device
    "gradient_accumulation_steps": auto
    'zero_optimization' : {
        stage: 2, reduce_bucket_size: 5e8, /* elements */ "overlap_comm": true # yes
        offload_optimizer: { device: 'nvme', nvme_path: '/local #1/it\'s "fast" \u00e9', },
    },
    optimizer: {
        type: AdamW
        params: { lr: 3e-5, betas: [
            0.8
            0.99,
        ], weight_decay: 0 },
    },
    bf16: { enabled: true, },
    steps_per_print: null,
}
/* the end */"#;

#[test]
fn hjson_gives_the_configuration_of_plain_json() {
    let expected = resolve(PLAIN).unwrap();
    assert_eq!(resolve(HJSON).unwrap(), expected);
    let inner = &HJSON[HJSON.find("\n{").unwrap() + 2..HJSON.rfind('}').unwrap()];
    for text in
        [inner.to_owned(), HJSON.replace('\n', "\r\n"), format!("\u{feff}{HJSON}"), format!("\u{feff}{PLAIN}\n")]
    {
        assert_eq!(resolve(&text).unwrap(), expected, "{text}");
    }
    assert_eq!(RawDsConfig::from_hjson("# nothing").unwrap(), RawDsConfig::from_hjson("{}").unwrap());
}

#[test]
fn a_string_without_quotes_ends_with_its_line() {
    let value = |text: &str| RawDsConfig::from_hjson(text).unwrap().get("a").cloned().unwrap();
    for (text, expected) in [
        ("a: b, c # d", json!("b, c # d")),
        ("{a: b}\n}", json!("b}")),
        ("a: true story", json!("true story")),
        ("a: 1-2, 3", json!("1-2, 3")),
        ("a: truer", json!("truer")),
        ("a: 1/* one */", json!(1)),
        ("{a:-1.5e1}", json!(-15.0)),
        ("{a:[1,x\n2]}", json!([1, "x", 2])),
    ] {
        assert_eq!(value(text), expected, "{text}");
    }
}

#[test]
fn duplicate_keys_and_malformed_text_are_refused_with_their_line() {
    for (text, expected) in [
        (r#"{"fp16": {"enabled": true, "enabled": false}}"#, "the key `enabled` appears twice at line 1 column 28"),
        ("a: 1\n# a: 3\n'a': 2", "the key `a` appears twice at line 3 column 1"),
        ("{", "expected a key, found the end of the file at line 1 column 2"),
        ("{\n  a 1\n}", "expected `:` after the key `a`, found `1` at line 2 column 5"),
        ("{a: }", "expected a value, found `}` at line 1 column 5"),
        ("{a: [1, 2", "expected a value, found the end of the file at line 1 column 10"),
        ("{a: 1}}", "expected the end, found `}` at line 1 column 7"),
        ("{a: 1,, b: 2}", "expected a key, found `, b: 2}` at line 1 column 7"),
        ("/* a: 1", "the comment `/*` has no end at line 1 column 1"),
        ("a: \"b", "the string has no end at line 1 column 4"),
        ("a: 'é", "the string has no end at line 1 column 4"),
        (
            "a: '''b'''",
            "strings over several lines (''') are not read; write the string in double quotes at line 1 column 4",
        ),
        (r#"a: "\u00é0""#, "without line breaks and with the escapes of JSON, found `\"\\u00é0\"` at line 1 column 4"),
    ] {
        let found = message(resolve(text));
        assert!(found.starts_with("not readable as Hjson: ") && found.contains(expected), "{text}: {found}");
    }
    let deep = message(resolve(&format!("a: {}", "[".repeat(100_000))));
    assert!(deep.contains("nested more than 64 deep at line 1"), "{deep}");
}
