use super::*;
use burn_peft::random;
use serde_json::json;

#[test]
fn every_repair_is_named() {
    let whole = json!([{"q": "a", "n": 1}, {"q": "b", "n": 2}]);
    for (text, repairs) in [
        (r#"[{"q":"a","n":1},{"q":"b","n":2}]"#, &[][..]),
        ("\u{feff}[{\"q\":\"a\",\"n\":1},{\"q\":\"b\",\"n\":2}]", &["byte order mark"]),
        ("Here:\n```json\n[{\"q\":\"a\",\"n\":1},{\"q\":\"b\",\"n\":2}]\n```\nDone.", &["code fence"]),
        (r#"Sure! [{"q":"a","n":1},{"q":"b","n":2}] Anything else?"#, &["text around"]),
        (r#"[{"q":"a","n":1,},{"q":"b","n":2},]"#, &["trailing comma"]),
        (r#"[{'q':'a','n':1},{“q”:“b”,"n":2}]"#, &["other quotes"]),
        (r#"[{"q"："a"，"n"：1}，{"q":"b","n":2}]"#, &["full-width punctuation"]),
        ("{\"q\":\"a\",\"n\":1}\n{\"q\":\"b\",\"n\":2}\n", &["one object after the other"]),
        (r#"[{q:"a",n:1},{"q":"b","n":2}]"#, &["key without quotes"]),
        (r#"[{"q":"a","n":1}{"q":"b","n":2}]"#, &["missing comma"]),
        (r#"[{"q":"a","n":1},{"q":"b","n":2},{"q":"c","#, &["cut off"]),
        (r#"[{"q":"a","n":1},{"q":"b","n":2},{"q":"c","n":12"#, &["cut off"]),
    ] {
        assert_eq!(find(text).as_ref(), Ok(&FoundJson { value: whole.clone(), repairs: repairs.to_vec() }), "{text}");
    }
    for (text, value, repair) in [
        ("[{\"q\":\"a\nb\"}]", json!([{"q": "a\nb"}]), "line break in a string"),
        ("[{\"q\":True,\"r\":None}]", json!([{"q": true, "r": null}]), "Python's constants"),
        (r#"[{"q":"the "big" one"}]"#, json!([{"q": "the \"big\" one"}]), "quotes inside a string"),
        (r#"{"items":[{"q":"a"},{"q":"b"#, json!({"items": [{"q": "a"}]}), "cut off"),
    ] {
        assert_eq!(find(text), Ok(FoundJson { value, repairs: vec![repair] }), "{text}");
    }
}

#[test]
fn text_without_a_value_has_a_reason() {
    for (text, reason) in [
        ("", "no JSON in the answer"),
        ("No.", "no JSON in the answer"),
        ("3", "no JSON in the answer"),
        ("[{\"q\":", "JSON cut off before its first item"),
        ("{", "JSON cut off before its first item"),
        ("[}", "JSON that cannot be repaired"),
        ("{\"a\" \"b\"}", "JSON that cannot be repaired"),
    ] {
        assert_eq!(find(text), Err(reason), "{text}");
    }
    assert!(find(&"[".repeat(100_000)).is_err());
    assert!(find(&"{\"a\":".repeat(100_000)).is_err());
}

#[test]
fn objects_are_found_in_a_list_or_around_it() {
    let names = |value| objects(value).iter().filter_map(|o| o["q"].as_str().map(str::to_owned)).collect::<Vec<_>>();
    assert_eq!(names(json!([{"q": "a"}, 3, {"q": "b"}])), ["a", "b"]);
    assert_eq!(names(json!({"n": 1, "items": [{"q": "a"}]})), ["a"]);
    assert_eq!(names(json!({"q": "a"})), ["a"]);
    assert!(objects(json!(3)).is_empty());
}

/// Items of which one is damaged at random: nothing panics, and what is found is complete.
#[test]
fn random_damage_never_panics() {
    let text = "```json\n{\"items\": [{\"q\": \"a \\u00e9 “x”\", 'n': None}, {“q”：1.5，\"r\": [true, {}]},]}\n``` end";
    let characters: Vec<char> = text.chars().collect();
    let pieces: Vec<char> = "[]{}\"'`“”‘’：，,:\\u19\n eTN-+.é\u{feff}".chars().collect();
    for round in 0..20_000_u64 {
        let draw = |counter: u64, below: usize| (random::bits(round, counter) % below as u64) as usize;
        let mut damaged = characters.clone();
        for change in 0..1 + round % 4 {
            if damaged.is_empty() {
                break;
            }
            let at = draw(3 * change, damaged.len());
            match draw(3 * change + 1, 3) {
                0 => drop(damaged.remove(at)),
                1 => damaged.insert(at, pieces[draw(3 * change + 2, pieces.len())]),
                _ => damaged.truncate(at + 1),
            }
        }
        let damaged: String = damaged.into_iter().collect();
        if let Ok(found) = find(&damaged) {
            assert!(found.value.is_array() || found.value.is_object(), "{damaged}");
            let _ = objects(found.value);
        }
    }
}
