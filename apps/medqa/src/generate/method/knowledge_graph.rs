//! Questions and answers from records of a knowledge graph, as Huatuo did: an answer may use the record alone.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, Step},
        filters::FilterRules,
        graph::{GraphRecord, KnowledgeGraph},
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method, qa_items,
    template::fill,
};
use burn_peft::random;

/// Questions of one request.
const QUESTIONS: usize = 2;
/// Predicates of symptoms, of uses of a drug, and of diseases that are mistaken for each other.
const SYMPTOMS: [&str; 3] = ["常见症状", "临床症状及体征", "symptoms"];
const USES: [&str; 2] = ["适应症", "indications"];
const DIFFERENTIALS: [&str; 3] = ["鉴别诊断", "相关疾病", "differential diagnosis"];
/// Fields that are asked for where a record has none of their predicates: their name, and the predicates.
const FIELDS_ZH: [(&str, &[&str]); 4] = [
    ("预后", &["预后", "预后状况"]),
    ("用法用量", &["用法用量"]),
    ("遗传方式", &["遗传因素", "遗传方式"]),
    ("禁忌", &["禁忌", "禁忌证"]),
];
const FIELDS_EN: [(&str, &[&str]); 3] =
    [("prognosis", &["prognosis"]), ("dose", &["dose", "dosage"]), ("contraindications", &["contraindications"])];

/// The kinds of questions about a record.
#[derive(Debug, Clone, Copy, PartialEq)]
enum QuestionKind {
    /// A patient tells symptoms without the name of the disease.
    Patient,
    /// Diagnosis and treatment from symptoms.
    Diagnosis,
    /// Uses, doses and side effects of a drug.
    Drug,
    /// Two diseases are told apart.
    Compare,
    /// Yes or no, with the reason.
    YesNo,
    /// The record does not have the answer.
    Missing,
}

impl QuestionKind {
    const ALL: [Self; 6] = [Self::Patient, Self::Diagnosis, Self::Drug, Self::Compare, Self::YesNo, Self::Missing];

    fn name(self) -> &'static str {
        match self {
            Self::Patient => "patient",
            Self::Diagnosis => "diagnosis",
            Self::Drug => "drug",
            Self::Compare => "compare",
            Self::YesNo => "yes-no",
            Self::Missing => "missing",
        }
    }

    /// Returns the rule of the kind, for the prompt; `{other}` is the second disease or the missing field.
    fn rule(self, language: Language) -> &'static str {
        match (language, self) {
            (Language::En, Self::Patient) => {
                "Each question is asked by a patient in the first person, who tells symptoms of the record and does not know the name of the disease. The answer says which disease it may be, and why."
            }
            (Language::En, Self::Diagnosis) => {
                "Each question gives symptoms or findings of the record and asks for the diagnosis, further tests and treatment."
            }
            (Language::En, Self::Drug) => {
                "Each question is about the drug of the record: what it is for, how it is taken, its side effects or who must not take it."
            }
            (Language::En, Self::Compare) => {
                "Each question asks how the two diseases of the records are told apart, or what they share."
            }
            (Language::En, Self::YesNo) => {
                "Each question can be answered by yes or no; the answer begins with it and gives the reason. One answer is yes, one is no."
            }
            (Language::En, Self::Missing) => {
                "Each question asks for the {other} of the entity, which the record does not have. The answer says that this information is not available, guesses nothing, and names whom to ask."
            }
            (Language::Zh, Self::Patient) => {
                "每个问题由患者用第一人称提出，说出记录中的症状，但不知道病名。答案说明可能是什么病以及依据。"
            }
            (Language::Zh, Self::Diagnosis) => "每个问题给出记录中的症状或体征，询问诊断、进一步检查和治疗。",
            (Language::Zh, Self::Drug) => "每个问题针对记录中的药物：用途、用法、不良反应或哪些人不能使用。",
            (Language::Zh, Self::Compare) => "每个问题询问两条记录中的疾病如何区分，或有什么共同点。",
            (Language::Zh, Self::YesNo) => {
                "每个问题可以用“是”或“否”回答；答案先给出判断，再说明理由。一个答案为“是”，一个为“否”。"
            }
            (Language::Zh, Self::Missing) => {
                "每个问题询问该实体的{other}，而记录中没有这项内容。答案说明没有这方面的信息，不作猜测，并指出可以咨询谁。"
            }
        }
    }
}

/// The method `knowledge-graph`.
pub(in super::super) struct GraphQuestions {
    language: Language,
    seed: u64,
    graph: KnowledgeGraph,
    /// Records in the order of the items.
    order: Vec<usize>,
}

/// The question of an item: its kind, its records and the second disease or missing field.
struct GraphQuestion<'a> {
    kind: QuestionKind,
    record: &'a GraphRecord,
    other: Option<&'a GraphRecord>,
    field: &'static str,
}

impl GraphQuestion<'_> {
    fn record_text(&self) -> String {
        let other = self.other.map(|other| format!("\n\n{}", other.text())).unwrap_or_default();
        self.record.text() + &other
    }
}

impl GraphQuestions {
    /// Creates the method; the records come in an order that the seed determines.
    pub(in super::super) fn new(graph: KnowledgeGraph, language: Language, seed: u64) -> Self {
        let mut order: Vec<usize> = (0..graph.records.len()).collect();
        let key = random::key(&[seed, random::key_from_str("knowledge-graph")]);
        order.sort_by_cached_key(|&index| (random::bits(key, index as u64), index));
        Self { language, seed, graph, order }
    }

    /// Returns the question of an item: one of the kinds that its record has facts for.
    fn question(&self, item: u64) -> Option<GraphQuestion<'_>> {
        let record = self.graph.records.get(*self.order.get(usize::try_from(item).ok()?)?)?;
        let kinds: Vec<_> = QuestionKind::ALL.iter().filter_map(|&kind| self.of_kind(kind, record)).collect();
        let key = random::key(&[self.seed, random::key_from_str(&record.name)]);
        let drawn = (random::bits(key, 0) % kinds.len().max(1) as u64) as usize;
        kinds.into_iter().nth(drawn)
    }

    /// Returns a question of one kind, if the record has the facts for it.
    fn of_kind<'a>(&'a self, kind: QuestionKind, record: &'a GraphRecord) -> Option<GraphQuestion<'a>> {
        let (has_symptoms, is_drug) = (record.values(&SYMPTOMS).is_some(), record.values(&USES).is_some());
        let fields: &[(&'static str, &[&str])] = match self.language {
            Language::En => &FIELDS_EN,
            Language::Zh => &FIELDS_ZH,
        };
        let missing = fields.iter().find(|(_, predicates)| record.values(predicates).is_none());
        let names = record.values(&DIFFERENTIALS).into_iter().flatten();
        let other = names.filter_map(|name| self.graph.record(name)).find(|other| other.name != record.name);
        let fits = match kind {
            QuestionKind::Patient | QuestionKind::Diagnosis => has_symptoms,
            QuestionKind::Drug => is_drug,
            QuestionKind::Compare => other.is_some(),
            QuestionKind::YesNo => true,
            QuestionKind::Missing => missing.is_some(),
        };
        fits.then(|| GraphQuestion {
            kind,
            record,
            other: other.filter(|_| kind == QuestionKind::Compare),
            field: missing.map_or("", |(name, _)| name),
        })
    }

    fn prompt(&self, question: &GraphQuestion) -> Prompt {
        let template = match self.language {
            Language::En => include_str!("../prompts/knowledge-graph.en.txt"),
            Language::Zh => include_str!("../prompts/knowledge-graph.zh.txt"),
        };
        let rule = fill(question.kind.rule(self.language), &[("other", question.field)]);
        let (count, record) = (QUESTIONS.to_string(), question.record_text());
        let text = fill(template.trim_end(), &[("count", &count), ("rule", &rule), ("record", &record)]);
        Prompt { temperature: 0.7, ..Prompt::user(text, 1536).with_schema(qa_items::schema()) }
    }

    fn check(&self, question: &GraphQuestion, draft: Draft) -> Draft {
        let record = question.record_text();
        let foreign = self.graph.foreign_drugs(&draft.answer, &format!("{record}\n{}", draft.question));
        let records = std::iter::once(question.record).chain(question.other);
        let values = records.flat_map(|record| record.facts.iter().flat_map(|fact| &fact.values));
        let supported = values.filter(|value| draft.answer.contains(value.as_str())).count();
        let lower = draft.answer.to_lowercase();
        let admits = ["没有", "未提供", "无法", "不清楚", "缺乏", "尚无", "not ", "no information", "cannot"];
        let flaw = if !foreign.is_empty() {
            Some("a drug that the record does not name")
        } else if question.kind == QuestionKind::Missing && !admits.iter().any(|word| lower.contains(word)) {
            Some("an answer where the record has none")
        } else if question.kind == QuestionKind::Patient && draft.question.contains(&question.record.name) {
            Some("question that gives the diagnosis away")
        } else {
            None
        };
        let mut draft = draft
            .with_origin("entity", question.record.name.as_str())
            .with_origin("kind", question.kind.name())
            .with_check("supported_values", supported)
            .with_check("foreign_drugs", foreign);
        draft.flaw = flaw;
        draft
    }
}

impl Method for GraphQuestions {
    fn num_items(&self) -> Option<u64> {
        Some(self.order.len() as u64)
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(question) = self.question(item) else { return Step::Done(Default::default()) };
        let Some(answer) = answers.first() else { return Step::Ask(self.prompt(&question)) };
        match qa_items::read(answer) {
            Err(reason) => Step::Unusable(reason),
            Ok(mut result) => {
                result.drafts = result.drafts.into_iter().map(|draft| self.check(&question, draft)).collect();
                Step::Done(result)
            }
        }
    }

    fn rules(&self) -> FilterRules {
        FilterRules { language: self.language, min_answer: 2, ..FilterRules::default() }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 1.0, rows: 1.6, answer_tokens: 250.0 }
    }
}

#[cfg(test)]
#[path = "knowledge_graph_tests.rs"]
mod tests;
