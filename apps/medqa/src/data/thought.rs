//! Thoughts of reasoning models: the tags around them, and where a row has them.

use burn_llama::Message;

/// The tags around a thought.
#[derive(Debug, Clone, Copy)]
struct ThoughtTags {
    open: &'static str,
    close: &'static str,
}

/// The tags of the models in use.
const THOUGHT_TAGS: [ThoughtTags; 6] = [
    ThoughtTags { open: "<think>", close: "</think>" },
    ThoughtTags { open: "<thinking>", close: "</thinking>" },
    ThoughtTags { open: "<thought>", close: "</thought>" },
    ThoughtTags { open: "<seed:think>", close: "</seed:think>" },
    ThoughtTags { open: "[THINK]", close: "[/THINK]" },
    ThoughtTags { open: "<|START_THINKING|>", close: "<|END_THINKING|>" },
];

/// A thought that a prompt has opened: the model's next token is its first one.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenThought {
    tags: ThoughtTags,
    /// True if the prompt goes to a new line after the tag.
    lines: bool,
}

impl OpenThought {
    /// Returns the thought that the end of a prompt opens.
    pub(super) fn at_end_of(prompt: &str) -> Option<Self> {
        let tags = THOUGHT_TAGS.into_iter().find(|tags| prompt.trim_end().ends_with(tags.open))?;
        Some(Self { tags, lines: prompt.ends_with('\n') })
    }

    /// Returns whether `message` has no thought, neither beside its text nor in it.
    pub(super) fn is_missing_in(self, message: &Message) -> bool {
        reasoning(message).is_none() && !message.text().contains(self.tags.close)
    }

    /// Returns what follows the prompt: the thought of `message`, its closing tag, and `answer`, which is what the
    /// template writes from the answer on. A thought that is not in the row is empty and is closed at once.
    pub(super) fn complete(self, message: &Message, answer: &str) -> String {
        let (line, gap) = if self.lines { ("\n", "\n\n") } else { ("", "") };
        let (thought, gap) = match (reasoning(message), message.text().rsplit_once(self.tags.close)) {
            (Some(thought), _) => (format!("{thought}{line}"), gap),
            (None, Some((thought, rest))) => {
                let thought = thought.split_once(self.tags.open).map_or(thought, |(_, thought)| thought);
                let thought = if self.lines { thought.trim_start_matches('\n') } else { thought };
                (thought.to_owned(), &rest[..rest.len() - rest.trim_start_matches('\n').len()])
            }
            (None, None) => (line.to_owned(), gap),
        };
        [&thought, self.tags.close, gap, answer.trim_start_matches('\n')].concat()
    }
}

/// Returns the thought that stands beside a message's text.
fn reasoning(message: &Message) -> Option<&str> {
    let texts = Message::REASONING_KEYS.iter().filter_map(|key| message.fields.get(*key)?.as_str());
    texts.map(|text| text.trim_matches('\n')).find(|text| !text.is_empty())
}

/// Splits the text of a message after its thought, if it has one.
pub(super) fn split_after_thought(text: &str) -> (&str, &str) {
    let ends = THOUGHT_TAGS.iter().filter_map(|tags| Some(text.rfind(tags.close)? + tags.close.len()));
    text.split_at(ends.max().unwrap_or(0))
}

/// Returns the parts of a text between the tags of thoughts.
pub(super) fn without_tags(text: &str) -> Vec<&str> {
    let mut parts = vec![text];
    for tag in THOUGHT_TAGS.iter().flat_map(|tags| [tags.open, tags.close]) {
        parts = parts.into_iter().flat_map(|part| part.split(tag)).collect();
    }
    parts
}
