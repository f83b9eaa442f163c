//! Checks of the tokenizer and the chat template.

use super::CheckSubject;
use crate::{
    data::{AnswerTokens, RowContent, answer_tokens, encode_row, pubmedqa_prompt},
    model,
    recipe::Learn,
    template::chat_template,
};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Message, Tokenizer, kernel::Kernels};

/// Sample texts of kinds that tokenizers treat differently: numbers, whitespace, scripts, symbols, punctuation.
const SAMPLE_TEXTS: [&str; 6] = [
    "Take 0.5 mg/kg twice daily; 100,000 cases in 2024.",
    "Two  spaces, three   spaces.\nA line.\n\n  An indented line.\n\tA tab.",
    "na\u{ef}ve caf\u{e9} \u{3b1}\u{3b2}\u{3b3} \u{441}\u{435}\u{440}\u{434}\u{446}\u{435}",
    "\u{5fc3}\u{81d3}\u{75c5}\u{3002}\u{642}\u{644}\u{628}",
    "\u{1f468}\u{200d}\u{2695}\u{fe0f} \u{2265} \u{b1} \u{b5}g \u{b0}C",
    "don't, DON'T, it's; x_1 = {a: [1, 2]} <b>bold</b>",
];

/// Checks that each named special token is encoded as one token, and that generation stops at the end token.
pub(super) fn special_tokens<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let tokenizer = &subject.loaded.tokenizer;
    let eos = tokenizer.eos().context("expected an end token (eos), found none: answers could not end")?;
    if !tokenizer.eos_ids().contains(&eos) {
        bail!("expected the end token {eos} among those that stop generation, found {:?}", tokenizer.eos_ids());
    }
    let (bos, end) = (tokenizer.bos().zip(tokenizer.bos_token()), Some(eos).zip(tokenizer.eos_token()));
    let mut words = Vec::new();
    for (name, id, token) in
        [("bos", bos), ("eos", end)].into_iter().filter_map(|(n, pair)| pair.map(|(i, t)| (n, i, t)))
    {
        let ids = tokenizer.encode(token, false)?;
        if ids != [id] {
            bail!("{name}: expected {token:?} to be the one token {id}, found {ids:?}");
        }
        words.push(format!("{name} {token} = {id}"));
    }
    Ok(format!("{}; generation stops at {:?}", words.join(", "), tokenizer.eos_ids()))
}

/// Checks that encoded texts decode to themselves.
pub(super) fn round_trip<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let tokenizer = &subject.loaded.tokenizer;
    for text in SAMPLE_TEXTS {
        let found = tokenizer.decode(&tokenizer.encode(text, false)?, false)?;
        if found != text {
            bail!("expected {text:?}, found {found:?}");
        }
    }
    Ok(format!("{} texts", SAMPLE_TEXTS.len()))
}

/// Checks that the chat template renders a question, and an answer that continues it and ends with an end token.
pub(super) fn template<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let tokenizer = &subject.loaded.tokenizer;
    let [question, _] = sample_messages();
    let text = chat_template(tokenizer)?.render(std::slice::from_ref(&question), None, true)?;
    if !text.contains(question.text()) {
        bail!("expected the question in the text, found {text:?}");
    }
    let AnswerTokens { prompt, answer } = answer_tokens(tokenizer, &sample_messages())?;
    Ok(format!("a question is {} tokens, its answer {}", prompt.len(), answer.len()))
}

/// Checks that training ends answers with a token at which generation stops.
pub(super) fn answer_end_token<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let tokenizer = &subject.loaded.tokenizer;
    let last = answer_tokens(tokenizer, &sample_messages())?.answer.last().copied();
    let token = last.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
    match last {
        Some(id) if tokenizer.eos_ids().contains(&id) => Ok(format!("{token} = {id}")),
        _ => bail!("expected answers to end with one of {:?}, found {token} = {last:?}", tokenizer.eos_ids()),
    }
}

fn sample_messages() -> [Message; 2] {
    [Message::new("user", "What is diabetes?"), Message::new("assistant", "A disease.")]
}

/// Checks that each learned answer follows exactly the tokens that `chat` (for PubMedQA, `eval`) gives the model there.
pub(super) fn training_matches_chat<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let tokenizer = &subject.loaded.tokenizer;
    let mut answers = 0;
    for row in &subject.rows {
        let place = || row.location.to_string();
        let (found, expected) = (
            encode_row(tokenizer, &row.content, subject.learn),
            answer_prompts(tokenizer, &row.content, subject.learn),
        );
        let (found, expected) = (found.with_context(place)?.examples, expected.with_context(place)?);
        for prompt in &expected {
            let learned = |example: &Example| example.loss_mask.get(prompt.len()) == Some(&true);
            if !found.iter().any(|example| example.ids.starts_with(prompt) && learned(example)) {
                let sent = tokenizer.decode(prompt, false)?;
                let tail: String = sent.chars().skip(sent.chars().count().saturating_sub(60)).collect();
                bail!("{}: no answer is learned after the {} tokens that end with {tail:?}", place(), prompt.len());
            }
        }
        answers += expected.len();
    }
    Ok(format!("{answers} answers of {} rows", subject.rows.len()))
}

/// Returns the prompt tokens before each learned answer of a row.
fn answer_prompts(tokenizer: &Tokenizer, content: &RowContent, learn: Learn) -> Result<Vec<Vec<u32>>> {
    match content {
        RowContent::Answer { prompt, .. } => Ok(vec![model::apply_chat_template(tokenizer, prompt)?]),
        // All of a text is learned, after no prompt.
        RowContent::Text(_) => Ok(Vec::new()),
        RowContent::PubMedQa { question, contexts, .. } => {
            Ok(vec![tokenizer.encode_plain(&pubmedqa_prompt(question, contexts), true)?])
        }
        RowContent::Conversation(conversation) => {
            let (messages, tools) = (conversation.messages(), conversation.tools.as_ref());
            let answers = || conversation.turns.iter().enumerate().filter(|(_, turn)| turn.message.role == "assistant");
            let first = if learn == Learn::Last { answers().count().saturating_sub(1) } else { 0 };
            let taught = answers().skip(first).filter(|(_, turn)| turn.learned);
            taught.map(|(index, _)| Ok(tokenizer.apply_chat_template(&messages[..index], tools, true)?)).collect()
        }
    }
}
