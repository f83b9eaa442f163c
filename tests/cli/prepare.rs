//! Tests of the verbs that prepare data.

use crate::{
    run::{refused_in, rows},
    work::WorkDir,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// Small random numbers, by SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end as u64) as usize
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Writes lines of JSON.
fn write_rows(work: &WorkDir, name: &str, rows: &[Value]) {
    work.write(name, &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
}

/// Returns a pronounceable word, in Latin letters.
fn latin_word(numbers: &mut Numbers) -> String {
    let part = |numbers: &mut Numbers| {
        let letters = [
            numbers.one_of(&["b", "d", "f", "k", "l", "m", "n", "r", "t", "v"]),
            numbers.one_of(&["a", "e", "i", "o", "u"]),
        ];
        letters.map(|letter| *letter).concat()
    };
    (0..3 + numbers.below(2)).map(|_| part(numbers)).collect::<String>() + "k"
}

/// Returns a question with its words, and how to join them.
fn question(numbers: &mut Numbers, chinese: bool) -> Vec<String> {
    if chinese {
        let character =
            |numbers: &mut Numbers| char::from_u32(0x4e00 + numbers.below(2500) as u32).unwrap().to_string();
        return (0..18 + numbers.below(10)).map(|_| character(numbers)).collect();
    }
    (0..12 + numbers.below(8)).map(|_| latin_word(numbers)).collect()
}

fn joined(words: &[String], chinese: bool) -> String {
    words.join(if chinese { "" } else { " " }) + if chinese { "？" } else { "?" }
}

#[test]
fn rows_survive_all_formats_and_kinds_of_files() {
    let work = WorkDir::new();
    let start = vec![
        json!({"question": "What is 1?", "answer": "A, \"number\".\nYes", "id": 7, "score": 0.5, "tags": ["a", "b"], "source": "x"}),
        json!({"question": "血压？", "answer": "p < 0.05 and > 3", "id": 8, "score": 1.5, "tags": [], "note": {"page": 3}}),
        json!({"question": " third ", "answer": "5", "id": 9, "score": 2.25, "tags": ["c"], "source": "5", "mixed": true}),
        json!({"question": "4", "answer": "", "id": 10, "score": -3.5, "tags": ["d"], "source": "", "mixed": "text"}),
    ];
    write_rows(&work, "0.jsonl", &start);
    for (from, to, format) in [
        ("0.jsonl", "1.json", "alpaca"),
        ("1.json", "2.jsonl.gz", "messages"),
        ("2.jsonl.gz", "3.jsonl.zst", "sharegpt"),
        ("3.jsonl.zst", "4.parquet", "sharegpt"),
        ("4.parquet", "5.csv", "messages"),
        ("5.csv", "6.parquet", "prompt-completion"),
        ("6.parquet", "7.tsv", "qa"),
        ("7.tsv", "8.csv", "qa"),
        ("8.csv", "9.jsonl", "qa"),
    ] {
        work.succeed(&["data", "convert", from, "--to", format, "--out", to]);
    }
    assert_eq!(work.lines("9.jsonl"), start);

    // Conversations with a system text, several turns, and an input of its own.
    let say = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages = json!({"messages": [say("system", "Be brief."), say("user", "a"), say("assistant", "b"), say("user", "c"),
        say("assistant", "d")], "id": 1});
    write_rows(&work, "messages.jsonl", std::slice::from_ref(&messages));
    let alpaca =
        json!({"instruction": "Say", "input": "this", "output": "ok", "system": "s", "history": [["p", "q"]], "id": 2});
    write_rows(&work, "alpaca.jsonl", std::slice::from_ref(&alpaca));
    for (first, format, row) in [("messages.jsonl", "messages", messages), ("alpaca.jsonl", "alpaca", alpaca)] {
        for other in ["alpaca", "messages", "sharegpt"] {
            work.succeed(&["data", "convert", first, "--to", other, "--out", "there.parquet"]);
            work.succeed(&["data", "convert", "there.parquet", "--to", format, "--out", "back.jsonl"]);
            assert_eq!(work.lines("back.jsonl"), std::slice::from_ref(&row), "{format} → {other} → {format}");
        }
    }
    for (arguments, words) in [
        (
            ["messages.jsonl", "--to", "qa"],
            ["messages.jsonl:1: expected one question and one answer", "messages and sharegpt hold them"],
        ),
        (["messages.jsonl", "--to", "text"], ["expected --to qa, alpaca", "found text"]),
    ] {
        refused_in(
            &work,
            &[&["data", "convert"], &arguments[..], &["--format", "messages", "--out", "out/rows.jsonl"]].concat(),
            &words,
        );
    }
    let leftover = work.listing().into_keys().find(|path| path.to_string_lossy().contains(".part"));
    assert_eq!(leftover, None);
}

#[test]
fn near_questions_are_found_and_different_ones_stay() {
    let work = WorkDir::new();
    let (mut numbers, mut all, mut twins) = (Numbers(1), Vec::new(), BTreeMap::new());
    for pair in 0..500 {
        let chinese = pair % 2 == 1;
        let words = question(&mut numbers, chinese);
        let mut near = words.clone();
        // One word is put in, taken out or replaced.
        let (place, word) = (numbers.below(near.len()), question(&mut numbers, chinese).remove(0));
        match pair % 3 {
            0 => near.insert(place, word),
            1 => drop(near.remove(place)),
            _ => near[place] = word,
        }
        all.push(json!({"question": joined(&words, chinese), "answer": "first", "pair": pair}));
        twins.insert(pair, json!({"question": joined(&near, chinese), "answer": "second one", "pair": pair}));
    }
    while all.len() + twins.len() < 10_000 {
        let chinese = all.len() % 2 == 1;
        all.push(json!({"question": joined(&question(&mut numbers, chinese), chinese), "answer": "alone"}));
    }
    twins.into_values().for_each(|twin| all.insert(500 + numbers.below(all.len() - 500), twin));
    write_rows(&work, "rows.jsonl", &all);
    let found = |threads: &str| {
        let mut command = work.command(&["data", "dedup", "rows.jsonl", "--out", "out/kept.jsonl", "--keep", "first"]);
        assert!(command.env("RAYON_NUM_THREADS", threads).output().unwrap().status.success());
        (work.text("out/kept.jsonl"), work.text("out/kept.removed.jsonl"), work.text("out/kept.counts.json"))
    };
    let once = found("1");
    assert_eq!(once, found("2"));
    let removed = work.lines("out/kept.removed.jsonl");
    let right = removed.iter().filter(|line| line["row"].get("pair").is_some()).count();
    assert!(right >= 485, "{right} of 500 pairs are found");
    assert!(right * 100 >= removed.len() * 99, "{right} of {} removed rows are planted", removed.len());
    assert_eq!(work.json("out/kept.counts.json")["kept"], 10_000 - removed.len());
    assert!(removed.iter().all(|line| line["details"]["other_answer"] == true && line["reason"] == "near question"));
}

#[test]
fn the_kept_answer_of_equal_questions_is_chosen() {
    let work = WorkDir::new();
    let row = |answer: &str| json!({"question": "What is Asthma ?", "answer": answer});
    write_rows(
        &work,
        "rows.jsonl",
        &[row("b"), row("long answer"), row("c"), row("c"), json!({"question": "what is asthma", "answer": "b"})],
    );
    for (keep, expected) in [("first", "b"), ("longest", "long answer"), ("most-frequent", "b")] {
        work.succeed(&["data", "dedup", "rows.jsonl", "--keep", keep, "--out", "kept.jsonl"]);
        let kept = work.lines("kept.jsonl");
        assert_eq!((kept.len(), &kept[0]["answer"]), (1, &json!(expected)), "{keep}");
    }
}

#[test]
fn rows_are_cleaned_and_what_is_taken_out_is_kept() {
    let work = WorkDir::new();
    let row = |question: &str, answer: &str| json!({"question": question, "answer": answer, "id": 1});
    write_rows(
        &work,
        "rows.jsonl",
        &[
            row("<p>What is <b>asthma</b>?</p>", "A disease&nbsp;of the airways.\u{200b}"),
            row("Was the result significant?", "p < 0.05 and > 3, BP <140/90 mmHg, 5 mg/kg b.i.d., E11.9"),
            row("Who can I call?", "Call 13812345678 or write to a@example.org."),
            row("", "An answer."),
            row("What is it?", " "),
            json!({"question": "no answer"}),
            row("什么是哮喘", "一种气道疾病。"),
        ],
    );
    let counts = work.succeed(&["data", "clean", "rows.jsonl", "--out", "clean.jsonl"]).json();
    assert_eq!(
        work.lines("clean.jsonl"),
        [
            row("What is asthma?", "A disease of the airways."),
            row("Was the result significant?", "p < 0.05 and > 3, BP <140/90 mmHg, 5 mg/kg b.i.d., E11.9"),
            row("Who can I call?", "Call <MOBILE> or write to <EMAIL>."),
            row("什么是哮喘", "一种气道疾病。"),
        ]
    );
    assert_eq!(counts["reasons"], json!({"empty question": 1, "empty answer": 1, "mistake": 1}));
    assert_eq!(counts["personal"], json!({"email": 1, "mobile": 1}));
    let removed = work.lines("clean.removed.jsonl");
    assert_eq!(removed[0]["at"], "rows.jsonl:4");
    assert!(removed[2]["details"].as_str().unwrap().contains("expected the key `answer`"), "{removed:?}");
    let dropped =
        work.succeed(&["data", "clean", "rows.jsonl", "--personal", "drop", "--language", "zh", "--out", "zh.jsonl"]);
    assert_eq!(work.lines("zh.jsonl"), [row("什么是哮喘", "一种气道疾病。")], "{dropped:?}");
    work.succeed(&["data", "clean", "rows.jsonl", "--personal", "report", "--out", "same.jsonl"]);
    assert!(work.text("same.jsonl").contains("13812345678"));
}

#[test]
fn no_group_crosses_a_split_and_no_row_moves_when_rows_are_added() {
    let work = WorkDir::new();
    let (mut numbers, mut all) = (Numbers(2), Vec::new());
    for group in 0..900 {
        let words = question(&mut numbers, group % 2 == 1);
        all.push(json!({"question": joined(&words, group % 2 == 1), "answer": "a", "group": group}));
        if group % 3 == 0 {
            let near = [vec![if group % 2 == 1 { "请" } else { "please" }.to_owned()], words].concat();
            all.push(json!({"question": joined(&near, group % 2 == 1), "answer": "b", "group": group}));
        }
    }
    let parts = |name: &str| -> BTreeMap<String, &'static str> {
        work.succeed(&["data", "split", name, "--valid", "0.1", "--test", "0.1", "--out-dir", "parts"]);
        let of = |part: &'static str| {
            work.lines(&format!("parts/{part}.jsonl")).into_iter().map(move |row| (row.to_string(), part))
        };
        ["train", "valid", "test"].into_iter().flat_map(of).collect()
    };
    write_rows(&work, "rows.jsonl", &all);
    let before = parts("rows.jsonl");
    assert_eq!(before.len(), all.len());
    let mut groups: BTreeMap<i64, BTreeSet<&str>> = BTreeMap::new();
    for (row, part) in &before {
        let row: Value = serde_json::from_str(row).unwrap();
        groups.entry(row["group"].as_i64().unwrap()).or_default().insert(part);
    }
    assert!(groups.values().all(|parts| parts.len() == 1));
    for part in ["valid", "test"] {
        let share = before.values().filter(|found| **found == part).count() as f64 / all.len() as f64;
        assert!((0.06..0.14).contains(&share), "{part}: {share}");
    }
    (0..100).for_each(|_| all.push(json!({"question": joined(&question(&mut numbers, false), false), "answer": "c"})));
    write_rows(&work, "more.jsonl", &all);
    let after = parts("more.jsonl");
    assert!(before.iter().all(|(row, part)| after.get(row) == Some(part)));
    // A column decides, if one is named.
    work.succeed(&[
        "data",
        "split",
        "rows.jsonl",
        "--by",
        "answer",
        "--valid",
        "0.4",
        "--seed",
        "3",
        "--out-dir",
        "by",
    ]);
    let answers = |part: &str| -> BTreeSet<String> {
        work.lines(&format!("by/{part}.jsonl")).iter().map(|row| row["answer"].to_string()).collect()
    };
    assert!(answers("train").is_disjoint(&answers("valid")));
}

#[test]
fn rows_of_a_test_set_are_found_both_ways() {
    let work = WorkDir::new();
    let mut numbers = Numbers(3);
    let text =
        |numbers: &mut Numbers, words: usize| -> Vec<String> { (0..words).map(|_| latin_word(numbers)).collect() };
    let (mut items, mut all) = (serde_json::Map::new(), Vec::new());
    for item in 0..100 {
        let (context, question) = (text(&mut numbers, 120), text(&mut numbers, 14));
        let mut quoted = context.clone();
        if item < 25 {
            all.push(json!({"question": "Summarize this.", "answer": context.join(" "), "item": item}));
        } else if item < 50 {
            for _ in 0..8 {
                let place = numbers.below(quoted.len());
                quoted[place] = latin_word(&mut numbers);
            }
            all.push(json!({"question": quoted.join(" "), "answer": "yes", "item": item}));
        }
        items.insert(
            item.to_string(),
            json!({"QUESTION": question.join(" "), "CONTEXTS": [context.join(" ")], "final_decision": "yes"}),
        );
    }
    (0..1000).for_each(|_| {
        all.push(json!({"question": text(&mut numbers, 15).join(" "), "answer": text(&mut numbers, 100).join(" ")}));
    });
    work.write("test.json", &Value::Object(items).to_string());
    write_rows(&work, "rows.jsonl", &all);
    let counts = work
        .succeed(&["data", "decontaminate", "rows.jsonl", "--against", "test.json", "--out", "out/clean.jsonl"])
        .json();
    let removed: Vec<u64> = work
        .lines("out/clean.removed.jsonl")
        .iter()
        .map(|line| line["row"]["item"].as_u64().unwrap_or(u64::MAX))
        .collect();
    assert!((0..25).all(|item| removed.contains(&item)), "every verbatim one");
    assert!(removed.iter().filter(|item| (25..50).contains(*item)).count() >= 23, "{removed:?}");
    assert!(removed.iter().all(|item| *item < 50), "no clean row");
    assert_eq!((&counts["test_items"], &counts["test_items_in_rows"]), (&json!(100), &json!(removed.len())));
    let items = work.lines("out/clean.items.jsonl");
    assert!(items.iter().all(|item| item["item"].as_str().unwrap().starts_with("test.json: ")
        && item["row"].as_str().unwrap().starts_with("rows.jsonl:")));
}

#[test]
fn a_sequence_of_verbs_ends_in_rows_that_train() {
    let work = WorkDir::new();
    let all = rows(0..40) + &rows(0..10) + "{\"question\": \"<b>What is 41?</b>\", \"answer\": \"It is a number.\"}\n";
    work.write("raw/one.jsonl", &all);
    fs::write(work.at("raw/ignored.md"), "text").unwrap();
    work.write(
        "prepare.toml",
        "input = 'raw'\nout = 'prepared'\n[[step]]\nverb = 'clean'\npersonal = 'report'\n[[step]]\nverb = 'dedup'\n[[step]]\n\
         verb = 'report'\n[[step]]\nverb = 'split'\nvalid = 0.2\n",
    );
    let done = work.succeed(&["data", "run", "prepare.toml"]);
    assert_eq!(done.stdout.lines().count(), 4, "{done:?}");
    assert_eq!(work.lines("prepared/2-dedup.jsonl").len(), 41);
    let page = work.text("prepared/3-report.html");
    assert!(page.contains("<svg") && !page.contains("href") && !page.contains("src="), "{page}");
    let parts = ["train", "valid"].map(|part| work.lines(&format!("prepared/4-split/{part}.jsonl")).len());
    assert_eq!(parts[0] + parts[1], 41);
    assert!(work.json("prepared/counts.json").as_array().unwrap().len() == 4);
    work.write("wrong.toml", "input = 'raw'\nout = 'out'\n[[step]]\nverb = 'clean'\npersonnel = 'mask'\n");
    refused_in(&work, &["data", "run", "wrong.toml"], &["wrong.toml: step 1, clean", "--personnel"]);

    work.write("a.jsonl", &rows(0..10));
    work.write("b.jsonl", &rows(20..24));
    let counts = work.succeed(&["data", "mix", "a.jsonl=0.5", "b.jsonl=2", "--out", "mixed.jsonl"]).json();
    assert_eq!(
        (&counts["sources"]["a.jsonl"]["taken"], &counts["sources"]["b.jsonl"]["taken"]),
        (&json!(5), &json!(8))
    );
    assert_eq!(work.lines("mixed.jsonl").len(), 13);
}
