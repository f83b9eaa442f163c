use super::{super::golden, *};
use serde_json::json;
use std::path::Path;

/// An invented graph in the layout of CMeKG.
fn graph() -> KnowledgeGraph {
    let drug =
        |uses: &str| json!({"适应症": [uses], "成份": ["甲成份"], "不良反应": ["头晕"], "用法用量": ["每日一次"]});
    let graph = json!({
        "甲型血压病": {
            "常见症状": ["乏力", "头痛", "X"], "检查": ["测量血压"], "药物治疗": ["甲洛尔"], "多发群体": ["老年人"],
            "鉴别诊断": ["乙型血压病"], "ICD10": ["I99"], "OTC类型": ["甲类"],
        },
        "乙型血压病": {"常见症状": ["心慌"], "检查": ["心电图"], "药物治疗": ["乙地平"], "多发群体": ["青年人"]},
        "甲洛尔片": drug("甲型血压病"),
        "乙地平片": drug("乙型血压病"),
        "单项": {"检查": ["抽血"]},
    });
    KnowledgeGraph::read(Path::new("graph.json"), graph.to_string().as_bytes(), 1).unwrap()
}

fn method() -> GraphQuestions {
    GraphQuestions::new(graph(), Language::Zh, 42)
}

#[test]
fn the_graph_is_filtered() {
    let graph = graph();
    let names: Vec<_> = graph.records.iter().map(|record| record.name.as_str()).collect();
    assert_eq!(names, ["甲型血压病", "乙型血压病", "甲洛尔片", "乙地平片"]);
    let text = graph.records[0].text();
    assert!(text.contains("常见症状：乏力；头痛\n") && !text.contains("I99") && !text.contains("甲类"), "{text}");
    for (text, words) in [("[]", "not read as a pickle"), ("{\"a\": 1}", "a: expected JSON"), ("{}", "found none")] {
        let error = KnowledgeGraph::read(Path::new("g"), text.as_bytes(), 1).unwrap_err();
        assert!(format!("{error:#}").contains(words), "{error:#}");
    }
}

#[test]
fn prompts_of_each_kind_are_the_golden_ones() {
    let method = method();
    for language in [Language::Zh, Language::En] {
        let method = GraphQuestions { language, graph: graph(), order: method.order.clone(), seed: 42 };
        let prompts = QuestionKind::ALL.map(|kind| {
            let record =
                method.graph.record(if kind == QuestionKind::Drug { "甲洛尔片" } else { "甲型血压病" }).unwrap();
            golden::text(&method.prompt(&method.of_kind(kind, record).unwrap())).to_owned()
        });
        golden::check(&format!("knowledge-graph.{}.txt", language.name()), &prompts.join("\n=====\n"));
    }
    // Each item has a question, and every record comes once.
    let entities: std::collections::HashSet<_> =
        (0..4).map(|item| method.question(item).unwrap().record.name.clone()).collect();
    assert_eq!(entities.len(), 4);
    assert!(method.question(4).is_none());
}

#[test]
fn a_drug_that_the_record_does_not_name_is_flagged() {
    let method = method();
    let record = method.graph.record("甲型血压病").unwrap();
    let flaw = |kind, question: &str, answer: &str| {
        let draft = Draft::qa(question, answer, Default::default());
        let checked = method.check(&method.of_kind(kind, record).unwrap(), draft);
        (checked.flaw, checked.checks["foreign_drugs"].clone(), checked.checks["supported_values"].clone())
    };
    let (yes_no, missing) = (QuestionKind::YesNo, QuestionKind::Missing);
    assert_eq!(flaw(yes_no, "能用甲洛尔吗？", "可以用甲洛尔，也要测量血压。"), (None, json!([]), json!(2)));
    let foreign = Some("a drug that the record does not name");
    assert_eq!(flaw(yes_no, "用什么药？", "可以用乙地平片。"), (foreign, json!(["乙地平片"]), json!(0)));
    assert_eq!(flaw(yes_no, "能用乙地平片吗？", "乙地平片不在其中。").0, None, "the question may name it");
    assert_eq!(flaw(missing, "预后如何？", "一般很好。").0, Some("an answer where the record has none"));
    assert_eq!(flaw(missing, "预后如何？", "没有这方面的信息，请咨询医生。").0, None);
    let given_away = Some("question that gives the diagnosis away");
    assert_eq!(flaw(QuestionKind::Patient, "我有甲型血压病吗？", "可能是。").0, given_away);
}
