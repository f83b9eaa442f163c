//! Encoding of conversations with the model's chat template; it marks the tokens that are learned.
//!
//! ```text
//! earlier turns ─ template with generation prompt ─ tokens that `chat` sends                     not learned
//! earlier turns and the answer ─ template ─ the tokens after those, up to the end token          learned
//! ```

use super::content::Turn;
use crate::model;
use anyhow::{Result, bail};
use burn_llama::{ChatTemplate, Example, Message, Tokenizer};

/// Encodes a conversation as examples in which the assistant's turns are learned. The tokens before an answer are those
/// that `chat` sends there. As a rule, each turn continues the tokens of the earlier turns, and the conversation is one
/// example. A new example begins where a template renders an earlier turn differently (Qwen3 drops the thoughts of past
/// turns), or the tokenizer splits the text differently.
///
/// # Errors
/// If the template rejects the turns, does not continue its generation prompt with the answer, or ends an answer
/// without an end token.
pub fn encode_conversation(tokenizer: &Tokenizer, turns: &[Turn]) -> Result<Vec<Example>> {
    let template = model::chat_template(tokenizer)?;
    let messages: Vec<Message> = turns.iter().map(|turn| turn.message.clone()).collect();
    let (mut done, mut example) = (Vec::new(), Example::default());
    for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.message.role == "assistant") {
        let (prompt, answer) = answer_tokens(tokenizer, template, &messages[..=index])?;
        if !prompt.starts_with(&example.ids) {
            done.push(std::mem::take(&mut example));
        }
        let from = example.ids.len();
        push_tokens(&mut example, &prompt[from..], false);
        push_tokens(&mut example, &answer, turn.learned);
    }
    done.push(example);
    done.retain(|example| example.num_targets() > 0);
    Ok(done)
}

fn push_tokens(example: &mut Example, ids: &[u32], learned: bool) {
    example.ids.extend(ids);
    example.loss_mask.resize(example.ids.len(), learned);
}

/// Returns the tokens before the last message, which is the assistant's, and those of that message up to its end token.
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
    let Some(said) = whole.strip_prefix(&opened) else { bail!(not_incremental_error(tokenizer, &opened, &whole)) };
    let (prompt, whole) = (tokenizer.encode(&opened, false)?, tokenizer.encode(&whole, false)?);
    let mut answer = match whole.strip_prefix(prompt.as_slice()) {
        Some(rest) => rest.to_vec(),
        // The answer's first characters would merge with the prompt's last ones, but `chat` has sent the prompt by
        // then.
        None => tokenizer.encode(said, false)?,
    };
    let ends = |ids: &[u32]| -> Vec<usize> {
        ids.iter().enumerate().filter(|(_, id)| tokenizer.eos_ids().contains(id)).map(|(place, _)| place).collect()
    };
    // The answer ends at the first end token that the template writes after the content, which may contain some itself.
    let closing = ends(&tokenizer.encode(text_after_content(said, content), false)?).len();
    let places = ends(&answer);
    let end = places.len().checked_sub(closing).and_then(|index| places.get(index));
    let Some(end) = end else { bail!(missing_end_token_error(tokenizer, said)) };
    answer.truncate(end + 1);
    Ok((prompt, answer))
}

/// Returns the text that the template writes after the content of a turn.
fn text_after_content<'a>(said: &'a str, content: &str) -> &'a str {
    let content = content.trim();
    // The first occurrence, since the text of an end token may contain a short content, as `<|im_end|>` contains "end".
    match said.find(content) {
        Some(at) if !content.is_empty() => &said[at + content.len()..],
        _ => said,
    }
}

fn not_incremental_error(tokenizer: &Tokenizer, opened: &str, whole: &str) -> String {
    let same = opened.char_indices().zip(whole.chars()).take_while(|((_, a), b)| a == b).count();
    let rest = |text: &str| text.chars().skip(same).take(40).collect::<String>();
    format!(
        "{}: this chat template cannot be rendered turn by turn, so the tokens to learn are unknown: expected an \
         answer to follow its prompt, which goes on {:?}, found {:?} in its place; use a model with another template, or \
         format qa for rows of one question and one answer",
        tokenizer.path().display(),
        rest(opened),
        rest(whole)
    )
}

fn missing_end_token_error(tokenizer: &Tokenizer, said: &str) -> String {
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
