//! Which tokens of a conversation are learned, by the model's own template.
//!
//! ```text
//! turns before ─ template, with the assistant's opening ─ tokens: what `chat` sends              read
//! turns before and the answer ─ template ─ the tokens after those, up to the turn's end token    learned
//! ```

use super::content::Turn;
use crate::model;
use anyhow::{Result, bail};
use burn_llama::{ChatTemplate, Example, Message, Tokenizer};

/// A conversation as examples that learn the assistant's turns. What is read before an answer are the tokens that `chat`
/// sends there. As a rule each turn continues the tokens of the turns before, and the conversation is one example; where a
/// template writes an earlier turn differently once it is past (Qwen3 leaves its thoughts out), or the tokenizer cuts the text
/// differently, a new example begins.
///
/// # Errors
/// If the template refuses the turns, does not begin an answer as it announces it, or ends one without an end token.
pub fn examples(tokenizer: &Tokenizer, turns: &[Turn]) -> Result<Vec<Example>> {
    let template = model::template(tokenizer)?;
    let messages: Vec<Message> = turns.iter().map(|turn| turn.message.clone()).collect();
    let (mut done, mut example) = (Vec::new(), Example::default());
    for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.message.role == "assistant") {
        let (prompt, answer) = answer_tokens(tokenizer, template, &messages[..=index])?;
        if !prompt.starts_with(&example.ids) {
            done.push(std::mem::take(&mut example));
        }
        let from = example.ids.len();
        extend(&mut example, &prompt[from..], false);
        extend(&mut example, &answer, turn.learned);
    }
    done.push(example);
    done.retain(|example| example.targets() > 0);
    Ok(done)
}

fn extend(example: &mut Example, ids: &[u32], learned: bool) {
    example.ids.extend(ids);
    example.learned.resize(example.ids.len(), learned);
}

/// The tokens before the last message, which is the assistant's, and those of the message up to its end token.
pub fn answer_tokens(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<(Vec<u32>, Vec<u32>)> {
    let (before, content) = match messages.split_last() {
        Some((answer, before)) => (before, answer.content.as_str()),
        None => bail!("expected an answer, found no message"),
    };
    let (opened, whole) = (template.render(before, true)?, template.render(messages, false)?);
    let Some(said) = whole.strip_prefix(&opened) else { bail!(not_incremental(tokenizer, &opened, &whole)) };
    let (prompt, whole) = (tokenizer.encode(&opened, false)?, tokenizer.encode(&whole, false)?);
    let mut answer = match whole.strip_prefix(prompt.as_slice()) {
        Some(rest) => rest.to_vec(),
        // The answer's first characters would merge with the prompt's last, which `chat` has sent by then.
        None => tokenizer.encode(said, false)?,
    };
    let ends = |ids: &[u32]| -> Vec<usize> {
        ids.iter().enumerate().filter(|(_, id)| tokenizer.eos_ids().contains(id)).map(|(place, _)| place).collect()
    };
    // The first end token that the template writes after the content, which may itself have some.
    let closing = ends(&tokenizer.encode(closing(said, content), false)?).len();
    let places = ends(&answer);
    let end = places.len().checked_sub(closing).and_then(|index| places.get(index));
    let Some(end) = end else { bail!(without_end(tokenizer, said)) };
    answer.truncate(end + 1);
    Ok((prompt, answer))
}

/// What the template writes after the content of a turn.
fn closing<'a>(said: &'a str, content: &str) -> &'a str {
    let content = content.trim();
    // The first place: an end token may have a short content in its name, as `<|im_end|>` has "end".
    match said.find(content) {
        Some(at) if !content.is_empty() => &said[at + content.len()..],
        _ => said,
    }
}

fn not_incremental(tokenizer: &Tokenizer, opened: &str, whole: &str) -> String {
    let same = opened.char_indices().zip(whole.chars()).take_while(|((_, a), b)| a == b).count();
    let rest = |text: &str| text.chars().skip(same).take(40).collect::<String>();
    format!(
        "{}: this chat template cannot be rendered turn by turn, so it is not known what the model should learn: expected an \
         answer to follow its prompt, which goes on {:?}, found {:?} in its place; use a model with another template, or \
         format qa for rows of one question and one answer",
        tokenizer.path().display(),
        rest(opened),
        rest(whole)
    )
}

fn without_end(tokenizer: &Tokenizer, said: &str) -> String {
    let ids = tokenizer.eos_ids().iter();
    let ends: Vec<_> = ids.filter_map(|&id| tokenizer.id_to_token(id)).collect();
    let tail: String = said.chars().skip(said.chars().count().saturating_sub(40)).collect();
    format!(
        "{}: this chat template ends an answer without an end token, so the model would not learn to stop: expected one of \
         [{}], found {tail:?}; use a model with another template, or format qa for rows of one question and one answer",
        tokenizer.path().display(),
        ends.join(", ")
    )
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
