//! Self-Instruct in Alpaca's form: three seed tasks are shown, and the model goes on with new ones, up to twenty in all.
//! A request depends on the seeds only, not on rows kept before.

use super::{
    super::{
        answer::ModelAnswer,
        draft::{Draft, ItemResult, RejectedText, RequestOrigin, Step},
        filters::FilterRules,
        recipe::Language,
        request::Prompt,
    },
    ExpectedSize, Method,
    template::fill,
};
use burn_peft::random;
use serde_json::Map;

/// Seed tasks that a prompt shows.
const SHOWN: usize = 3;
/// Tasks of the list that the model continues.
const LISTED: usize = 20;

/// A seed task.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct SeedTask {
    pub instruction: String,
    pub input: String,
    pub output: String,
}

/// The method `self-instruct`.
pub(in super::super) struct SelfInstruct {
    pub seed: u64,
    pub language: Language,
    pub tasks: Vec<SeedTask>,
}

/// The labels of a task.
struct Labels {
    instruction: &'static str,
    input: &'static str,
    output: &'static str,
    none: &'static str,
}

const ENGLISH: Labels = Labels { instruction: "Instruction", input: "Input", output: "Output", none: "<noinput>" };
const CHINESE: Labels = Labels { instruction: "指令", input: "输入", output: "输出", none: "<无输入>" };

impl SelfInstruct {
    fn labels(&self) -> &'static Labels {
        match self.language {
            Language::En => &ENGLISH,
            Language::Zh => &CHINESE,
        }
    }

    /// Draws the tasks that the prompt of an item shows, without repetition.
    fn shown(&self, item: u64) -> Vec<usize> {
        let key = random::key(&[self.seed, random::key_from_str("self-instruct"), item]);
        let mut order: Vec<usize> = (0..self.tasks.len()).collect();
        for place in 0..SHOWN.min(order.len()) {
            let rest = order.len() - place;
            order.swap(place, place + (random::bits(key, place as u64) % rest as u64) as usize);
        }
        order.truncate(SHOWN);
        order
    }

    fn prompt(&self, item: u64) -> String {
        let template = match self.language {
            Language::En => include_str!("../prompts/self-instruct.en.txt"),
            Language::Zh => include_str!("../prompts/self-instruct.zh.txt"),
        };
        let labels = self.labels();
        let mut tasks = String::new();
        for (number, &index) in self.shown(item).iter().enumerate() {
            let SeedTask { instruction, input, output } = &self.tasks[index];
            let (n, input) = (number + 1, if input.trim().is_empty() { labels.none } else { input.trim() });
            let lines =
                [(labels.instruction, instruction.trim()), (labels.input, input), (labels.output, output.trim())];
            let lines: Vec<_> = lines.iter().map(|(label, text)| format!("{n}. {label}: {text}\n")).collect();
            tasks += &format!("###\n{}", lines.concat());
        }
        let next = (self.shown(item).len() + 1).to_string();
        let text = fill(template, &[("count", &LISTED.to_string()), ("tasks", &tasks), ("next", &next)]);
        text.trim_end().to_owned()
    }

    fn parse(&self, item: u64, answer: &ModelAnswer) -> ItemResult {
        let labels = self.labels();
        let mut result = ItemResult::default();
        let seeds = self.shown(item);
        // A model that goes on after the open item does not repeat its label.
        let labelled =
            without_number(answer.text.trim_start_matches(['#', '*', '\n', ' '])).starts_with(labels.instruction);
        let text = match labelled {
            true => answer.text.clone(),
            false => format!("{}: {}", labels.instruction, answer.text),
        };
        let mut blocks: Vec<&str> = split_tasks(&text, labels);
        if answer.truncated && blocks.pop().is_some() {
            result.rejected.push(cut_off());
        }
        for block in blocks {
            let Some(task) = parse_task(block, labels) else {
                result
                    .rejected
                    .push(RejectedText { reason: "a task without its parts".to_owned(), text: block.to_owned() });
                continue;
            };
            let draft = task.draft(answer).with_origin("seed_ids", seeds.clone());
            result.drafts.push(draft);
        }
        result
    }
}

fn cut_off() -> RejectedText {
    RejectedText { reason: "a task cut off at the end".to_owned(), text: String::new() }
}

impl SeedTask {
    fn draft(&self, answer: &ModelAnswer) -> Draft {
        let mut columns = Map::new();
        for (name, text) in [("instruction", &self.instruction), ("input", &self.input), ("output", &self.output)] {
            columns.insert(name.to_owned(), text.as_str().into());
        }
        Draft {
            columns,
            question: self.instruction.clone(),
            answer: self.output.clone(),
            request: RequestOrigin::from(answer),
            ..Draft::default()
        }
    }
}

/// Splits an answer into its tasks: at `###`, and before each line with the label of an instruction.
fn split_tasks<'a>(text: &'a str, labels: &Labels) -> Vec<&'a str> {
    let mut blocks = Vec::new();
    for part in text.split("###") {
        let mut start = 0;
        for (at, _) in part.match_indices('\n') {
            let line = &part[at + 1..];
            if without_number(line).starts_with(labels.instruction) && !part[start..at].trim().is_empty() {
                blocks.push(&part[start..at]);
                start = at + 1;
            }
        }
        blocks.push(&part[start..]);
    }
    blocks.retain(|block| without_number(block).trim().chars().count() > 1);
    blocks
}

/// Takes the number off the beginning of a line, such as `4. `.
fn without_number(line: &str) -> &str {
    let line = line.trim_start().trim_start_matches(['*', '#', ' ']);
    line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(['.', '、', ')', ' '])
}

fn parse_task(block: &str, labels: &Labels) -> Option<SeedTask> {
    let (instruction, rest) = after_label(block, labels.instruction).and_then(|rest| cut(rest, labels.input))?;
    let (input, output) = cut(rest, labels.output)?;
    let input = input.trim();
    let absent = input.is_empty() || input.eq_ignore_ascii_case(labels.none) || input.eq_ignore_ascii_case("<noinput>");
    Some(SeedTask {
        instruction: instruction.trim().to_owned(),
        input: if absent { String::new() } else { input.to_owned() },
        output: output.trim().to_owned(),
    })
}

/// Returns the text before a line with a label, and the text after the label.
fn cut<'a>(text: &'a str, label: &str) -> Option<(&'a str, &'a str)> {
    text.match_indices('\n').find_map(|(at, _)| Some((&text[..at], after_label(&text[at + 1..], label)?)))
}

fn after_label<'a>(line: &'a str, label: &str) -> Option<&'a str> {
    let rest = without_number(line).strip_prefix(label)?.trim_start_matches(['*', ' ']);
    rest.strip_prefix([':', '：']).map(|rest| rest.trim_start_matches(['*', ' ']))
}

impl Method for SelfInstruct {
    fn num_items(&self) -> Option<u64> {
        None
    }

    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step {
        let Some(answer) = answers.first() else {
            let stop = vec![format!("\n{LISTED}."), format!("\n###\n{LISTED}.")];
            return Step::Ask(Prompt { stop, ..Prompt::user(self.prompt(item), 3072) });
        };
        let result = self.parse(item, answer);
        if result.drafts.is_empty() { Step::Unusable("no task in the answer") } else { Step::Done(result) }
    }

    fn rules(&self) -> FilterRules {
        let known = self.tasks.iter().map(|task| task.instruction.clone()).collect();
        FilterRules { language: self.language, max_rouge: Some(0.7), known, is_instruction: true, min_answer: 1 }
    }

    fn expected_size(&self) -> ExpectedSize {
        ExpectedSize { requests: 1.0, rows: 10.0, answer_tokens: 2000.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden, *};

    fn method(language: Language) -> SelfInstruct {
        let task = |i: usize| SeedTask {
            instruction: format!("Explain term {i}."),
            input: if i == 1 { "term".to_owned() } else { String::new() },
            output: format!("It is {i}."),
        };
        SelfInstruct { seed: 42, language, tasks: (0..5).map(task).collect() }
    }

    fn rows(language: Language, text: &str, truncated: bool) -> Vec<[String; 3]> {
        let answer = ModelAnswer { text: text.to_owned(), truncated, created: None, key: "k".to_owned() };
        let text = |draft: &Draft, name: &str| draft.columns[name].as_str().unwrap().to_owned();
        let result = method(language).parse(0, &answer);
        result.drafts.iter().map(|d| ["instruction", "input", "output"].map(|name| text(d, name))).collect()
    }

    #[test]
    fn prompts_are_the_golden_ones_and_draw_other_seeds_for_each_item() {
        golden::check("self-instruct.en.txt", &method(Language::En).prompt(0));
        golden::check("self-instruct.zh.txt", &method(Language::Zh).prompt(0));
        let drawn: std::collections::HashSet<_> = (0..40).map(|item| method(Language::En).shown(item)).collect();
        assert!(drawn.len() > 20 && drawn.iter().all(|seeds| seeds.len() == SHOWN));
    }

    #[test]
    fn answers_are_split_into_tasks() {
        let text = "Name two vitamins.\n4. Input: <noinput>\n4. Output: A and\nB.\n###\n5. Instruction: Say it.\n5. \
                    Input: x\n5. Output: y\n###\n6. Instruction: Cut";
        let expected = [["Name two vitamins.", "", "A and\nB."], ["Say it.", "x", "y"]];
        assert_eq!(rows(Language::En, text, true), expected);
        let labelled = "4. Instruction: Name two vitamins.\n4. Input:\n4. Output: A and\nB.\n5. Instruction: Say it.\n\
                        5. Input: x\n5. Output: y\n";
        assert_eq!(rows(Language::En, labelled, false), expected);
        let bold = "**Instruction:** Name two vitamins.\n**Input:** <noinput>\n**Output:** A and\nB.\n###\n\
                    **Instruction:** Say it.\n**Input:** x\n**Output:** y";
        assert_eq!(rows(Language::En, bold, false), expected);
        let chinese = "4. 指令：说出两种维生素。\n4. 输入：<无输入>\n4. 输出：甲和乙。\n###\n5. 指令: 解释。\n5. 输入: 词\n5. 输出: 好。";
        assert_eq!(
            rows(Language::Zh, chinese, false),
            [["说出两种维生素。", "", "甲和乙。"], ["解释。", "词", "好。"]]
        );
        assert!(rows(Language::En, "I cannot do that.", false).is_empty());
    }
}
