//! A knowledge graph: entities with lists of values by predicate, and the names of its drugs.

use super::{personal, pickle};
use anyhow::{Context, Result, anyhow, bail};
use burn_peft::random;
use serde_json::{Map, Value};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

/// Predicates of administration, which no patient asks about.
const ADMINISTRATIVE: [&str; 9] =
    ["OTC类型", "药品监管分级", "英文名", "英文名称", "药品类型", "ICD10", "ICD-10", "分类", "上位关系"];
/// Predicates that only drugs have.
const OF_DRUGS: [&str; 5] = ["适应症", "成份", "药品类型", "indications", "ingredients"];
/// Fewest medical predicates of an entity, most values of a predicate, and fewest characters of a drug's name that is
/// searched for.
const FEWEST_PREDICATES: usize = 4;
const MOST_VALUES: usize = 8;
const SHORTEST_DRUG: usize = 3;

/// An entity with its medical facts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GraphRecord {
    pub name: String,
    /// Values by predicate, in the order of the graph.
    pub facts: Vec<GraphFact>,
}

/// The values of a predicate.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GraphFact {
    pub predicate: String,
    pub values: Vec<String>,
}

impl GraphRecord {
    /// Returns the values of the first of the predicates that the entity has.
    pub(super) fn values(&self, predicates: &[&str]) -> Option<&[String]> {
        let fact = self.facts.iter().find(|fact| predicates.contains(&fact.predicate.as_str()))?;
        Some(&fact.values)
    }

    /// Returns the record as text, one line for each predicate.
    pub(super) fn text(&self) -> String {
        let lines = self.facts.iter().map(|fact| format!("{}：{}", fact.predicate, fact.values.join("；")));
        std::iter::once(self.name.clone()).chain(lines).collect::<Vec<_>>().join("\n")
    }
}

/// The entities that are worth a question, and the names of all drugs.
#[derive(Debug, Default)]
pub(super) struct KnowledgeGraph {
    pub records: Vec<GraphRecord>,
    by_name: HashMap<String, usize>,
    drugs: HashSet<String>,
    longest_drug: usize,
}

/// Records of a graph as they stand in its file.
type RawRecords = pickle::PickledRecords;

impl KnowledgeGraph {
    /// Reads a graph from a pickle or a JSON file of the form `{entity: {predicate: [value, ...]}}`, and filters it:
    /// predicates of administration, values of one character and entities with few predicates are left out, and long
    /// lists are shortened by `seed`.
    ///
    /// # Errors
    /// If the file is no such graph.
    pub(super) fn read(path: &Path, bytes: &[u8], seed: u64) -> Result<Self> {
        let raw = match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'{') => from_json(bytes),
            _ => pickle::read(bytes).map_err(|problem| anyhow!("not read as a pickle: {problem}")),
        };
        let graph = Self::new(raw.with_context(|| path.display().to_string())?, seed);
        if graph.records.is_empty() {
            bail!("{}: expected entities with at least {FEWEST_PREDICATES} predicates, found none", path.display());
        }
        Ok(graph)
    }

    fn new(raw: RawRecords, seed: u64) -> Self {
        let mut graph = Self::default();
        for (name, fields) in raw {
            let name = name.trim().to_owned();
            let is_drug = fields.iter().any(|(predicate, _)| OF_DRUGS.contains(&predicate.as_str()));
            let length = name.chars().count();
            if is_drug && length >= SHORTEST_DRUG {
                graph.longest_drug = graph.longest_drug.max(length);
                graph.drugs.insert(name.to_lowercase());
            }
            let facts: Vec<GraphFact> = fields.into_iter().filter_map(|fact| filtered(&name, fact, seed)).collect();
            if facts.len() >= FEWEST_PREDICATES {
                graph.by_name.insert(name.clone(), graph.records.len());
                graph.records.push(GraphRecord { name, facts });
            }
        }
        graph
    }

    /// Returns the record of an entity.
    pub(super) fn record(&self, name: &str) -> Option<&GraphRecord> {
        self.records.get(*self.by_name.get(name)?)
    }

    /// Returns the drugs of the graph that a text names and `allowed` does not, the longest name at each place.
    pub(super) fn foreign_drugs(&self, text: &str, allowed: &str) -> Vec<String> {
        let (characters, allowed) = (text.to_lowercase().chars().collect::<Vec<_>>(), allowed.to_lowercase());
        let (mut found, mut at) = (Vec::new(), 0);
        while at < characters.len() {
            let longest = self.longest_drug.min(characters.len() - at);
            let name = (SHORTEST_DRUG..=longest).rev().find_map(|length| {
                let name: String = characters[at..at + length].iter().collect();
                (self.drugs.contains(&name) && is_word(&characters, at, length)).then_some((name, length))
            });
            let Some((name, length)) = name else {
                at += 1;
                continue;
            };
            if !allowed.contains(&name) && !found.contains(&name) {
                found.push(name);
            }
            at += length;
        }
        found
    }

    /// Refuses phone and identity numbers in the values.
    ///
    /// # Errors
    /// One line that names the first entity with one.
    pub(super) fn check_personal(&self, path: &Path) -> Result<()> {
        for record in &self.records {
            let values = record.facts.iter().flat_map(|fact| &fact.values);
            if let Some(kind) = values.into_iter().find_map(|value| personal::find(value)) {
                bail!(
                    "{}: {}: {kind} stands in it; nothing was sent. Take it out, or say --allow-personal-data",
                    path.display(),
                    record.name
                );
            }
        }
        Ok(())
    }
}

/// Returns whether a name in Latin script stands alone, not inside a longer word.
fn is_word(characters: &[char], at: usize, length: usize) -> bool {
    let is_letter = |c: Option<&char>| c.is_some_and(char::is_ascii_alphabetic);
    let starts = is_letter(characters.get(at)) && at > 0 && is_letter(characters.get(at - 1));
    let ends = is_letter(characters.get(at + length - 1)) && is_letter(characters.get(at + length));
    !starts && !ends
}

/// Filters the values of a predicate; none if nothing medical is left.
fn filtered(entity: &str, fact: (String, Vec<String>), seed: u64) -> Option<GraphFact> {
    let (predicate, values) = fact;
    if ADMINISTRATIVE.contains(&predicate.as_str()) {
        return None;
    }
    let mut values: Vec<String> = values.iter().map(|value| value.trim().to_owned()).collect();
    values.retain(|value| value.chars().count() > 1);
    let key = random::key(&[seed, random::key_from_str(entity), random::key_from_str(&predicate)]);
    while values.len() > MOST_VALUES {
        values.remove((random::bits(key, values.len() as u64) % values.len() as u64) as usize);
    }
    (!values.is_empty()).then_some(GraphFact { predicate, values })
}

fn from_json(bytes: &[u8]) -> Result<RawRecords> {
    let expected = "expected JSON of the form {entity: {predicate: [value, ...]}}";
    let entities: Map<String, Value> = serde_json::from_slice(bytes).context(expected)?;
    let record = |(name, fields): (String, Value)| {
        let Value::Object(fields) = fields else { bail!("{name}: {expected}") };
        let values = |(predicate, value): (String, Value)| {
            let values: Vec<String> = match value {
                Value::String(text) => vec![text],
                Value::Array(items) if items.iter().all(Value::is_string) => {
                    items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
                }
                _ => bail!("{name}: `{predicate}`: {expected}"),
            };
            Ok((predicate, values))
        };
        let fields = fields.into_iter().map(values).collect::<Result<_>>()?;
        Ok((name.clone(), fields))
    };
    entities.into_iter().map(record).collect()
}
