//! The rules that `tokenizer.ggml.pre` names split texts as in llama.cpp, under every name.

use std::collections::BTreeSet;
use std::path::Path;

use burn_llama::{Tokenizer, checkpoint::gguf::Gguf};
use laws::fixture;
use serde::Deserialize;

/// The content of `pre-tokenizers.json`.
#[derive(Deserialize)]
struct Cases {
    texts: Vec<String>,
    rules: Vec<Rules>,
}

/// A set of rules, with llama.cpp's ids of every text.
#[derive(Deserialize)]
struct Rules {
    names: Vec<String>,
    add_bos: bool,
    ids: Vec<Vec<u32>>,
}

fn cases() -> Cases {
    serde_json::from_slice(&std::fs::read(fixture("gguf/pre-tokenizers.json")).unwrap()).unwrap()
}

/// Opens the vocabulary under the rules `pre`, from a file in `folder`.
fn vocabulary(pre: &str, folder: &Path) -> Gguf {
    let bytes = std::fs::read(fixture("gguf/pre-tokenizers.gguf")).unwrap();
    let entry = |pre: &str| {
        let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        [string("tokenizer.ggml.pre"), 8u32.to_le_bytes().to_vec(), string(pre)].concat()
    };
    let (old, path) = (entry("default"), folder.join("vocabulary.gguf"));
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    std::fs::write(&path, [&bytes[..at], &entry(pre), &bytes[at + old.len()..]].concat()).unwrap();
    Gguf::open(&path).unwrap()
}

/// Returns the texts of which the ids differ from `rules`, with both.
fn differences(tokenizer: &Tokenizer, rules: &Rules, texts: &[String]) -> Vec<String> {
    let all = texts.iter().zip(&rules.ids).map(|(text, ids)| (text, ids, tokenizer.encode(text, false).unwrap()));
    all.filter(|(_, ids, found)| *ids != found)
        .map(|(text, ids, found)| {
            let words = |ids: &[u32]| ids.iter().filter_map(|id| tokenizer.id_to_token(*id)).collect::<Vec<_>>();
            format!("{} {text:?}\n  expected {:?}\n  found    {:?}", rules.names[0], words(ids), words(&found))
        })
        .collect()
}

#[test]
fn ids_under_every_name_equal_those_of_llama_cpp() {
    let (Cases { texts, rules }, folder) = (cases(), tempfile::tempdir().unwrap());
    let mut wrong = Vec::new();
    for rules in &rules {
        for name in &rules.names {
            let tokenizer = Tokenizer::from_gguf(&vocabulary(name, folder.path())).unwrap();
            let bos = tokenizer.encode("", true).unwrap();
            assert_eq!(bos, if rules.add_bos { vec![0] } else { vec![] }, "{name}");
            wrong.extend(differences(&tokenizer, rules, &texts));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn rules_written_as_tokenizer_json_give_the_same_ids() {
    let (Cases { texts, rules }, folder) = (cases(), tempfile::tempdir().unwrap());
    for rules in &rules {
        Tokenizer::from_gguf(&vocabulary(&rules.names[0], folder.path())).unwrap().save(folder.path()).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let wrong = differences(&tokenizer, rules, &texts);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

#[test]
fn rules_differ_and_each_name_has_one() {
    let rules = cases().rules;
    for (index, one) in rules.iter().enumerate() {
        for other in &rules[..index] {
            let of = |rules: &Rules| (rules.add_bos, rules.ids.clone());
            assert!(of(one) != of(other), "{:?} and {:?}", one.names, other.names);
        }
    }
    // The error for another name lists exactly the names of which the ids are known.
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_gguf(&vocabulary("gemma4", folder.path())).unwrap_err().to_string();
    assert!(error.contains("vocabulary.gguf") && error.ends_with("found \"gemma4\""), "{error}");
    let listed = error.split_once("tokenizer.ggml.pre: expected one of ").unwrap().1.rsplit_once(", found").unwrap().0;
    let tested: Vec<&str> = rules.iter().flat_map(|rules| &rules.names).map(String::as_str).collect();
    assert_eq!(listed.split(", ").collect::<BTreeSet<_>>(), tested.iter().copied().collect::<BTreeSet<_>>());
    assert_eq!(listed.split(", ").count(), tested.len());
}
