use super::*;
use crate::data::{
    RowContent,
    check::mark_learned,
    content::Turn,
    encode_row as of_row,
    test_tokenizers::{byte_level, fixture, sentencepiece},
};
use std::fs;

/// Returns a chat template from the fixtures that agree with `transformers`.
fn of_fixture(name: &str) -> String {
    let file: Value = serde_json::from_slice(&fs::read(fixture(&format!("templates/{name}.json"))).unwrap()).unwrap();
    file["template"].as_str().unwrap().to_owned()
}

/// Template like SmolLM2's: it has a default system prompt and ends turns with `<|im_end|>`.
const SMOLLM2: &str = "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}\
    {{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}\
    {{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// Template like Qwen3's: a last answer without thoughts gets empty ones, and past answers lose theirs.
const QWEN3: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}\
    {% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\
    {{ m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// Template like Mistral's: roles must alternate, and there is no system prompt.
const MISTRAL: &str = "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('roles must alternate user and assistant') }}{% endif %}\
    {% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}\
    {% endfor %}";
/// Template like TinyLlama's: role markers are plain text, and lines end after the end token.
const TINYLLAMA: &str = "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\\n' + m['content'] + eos_token }}\n\
    {% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + eos_token }}\n\
    {% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' + m['content'] + eos_token }}\n{% endif %}\n\
    {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";

fn turns(list: &[(&str, &str)]) -> Vec<Turn> {
    list.iter().map(|(role, content)| Turn { message: Message::new(*role, *content), learned: true }).collect()
}

fn encode(tokenizer: &Tokenizer, turns: &[Turn]) -> Result<EncodedConversation> {
    encode_conversation(tokenizer, &turns.to_vec().into(), Learn::All, MissingEnd::Refuse)
}

fn examples(tokenizer: &Tokenizer, turns: &[Turn]) -> Vec<Example> {
    encode(tokenizer, turns).unwrap().examples
}

/// Returns the examples of a conversation as texts with the learned tokens in brackets, and asserts that every answer
/// follows the tokens that `chat` sends.
fn learned(tokenizer: &Tokenizer, turns: &[Turn]) -> Vec<String> {
    let found = examples(tokenizer, turns);
    let messages: Vec<Message> = turns.iter().map(|turn| turn.message.clone()).collect();
    let mut starts: Vec<&[u32]> = Vec::new();
    for example in &found {
        let begins = |&at: &usize| example.loss_mask[at] && !example.loss_mask[at - 1];
        starts.extend((1..example.ids.len()).filter(begins).map(|at| &example.ids[..at]));
        assert!(tokenizer.eos_ids().contains(example.ids.last().unwrap()), "{turns:?}");
    }
    let answers = turns.iter().enumerate().filter(|(_, turn)| turn.learned && turn.message.role == "assistant");
    let sent: Vec<_> =
        answers.map(|(i, _)| crate::model::apply_chat_template(tokenizer, &messages[..i]).unwrap()).collect();
    assert_eq!(starts, sent, "{turns:?}");
    found.iter().map(|example| mark_learned(tokenizer, example, "[[", "]]").unwrap()).collect()
}

const LLAMA3: [&str; 4] = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"];
const CHATML: [&str; 3] = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"];
const TWO: [(&str, &str); 4] =
    [("user", "One?"), ("assistant", "The first."), ("user", "Two?"), ("assistant", "The end.\nOf it.")];

fn llama3() -> Tokenizer {
    byte_level(&of_fixture("llama3"), [LLAMA3[0], LLAMA3[1]], &LLAMA3[2..])
}

fn chatml(template: &str) -> Tokenizer {
    byte_level(template, [CHATML[0], CHATML[1]], &CHATML)
}

#[test]
fn the_assistant_s_turns_are_learned_up_to_their_end_token() {
    let qwen = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n\
        <|im_start|>assistant\n[[The first.<|im_end|>]]\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n\
        [[The end.\nOf it.<|im_end|>]]";
    for (name, tokenizer, expected) in [
        (
            "Llama 3",
            llama3(),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n[[The first.<|eot_id|>]]\
             <|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n[[The end.\nOf it.<|eot_id|>]]",
        ),
        ("Qwen2", chatml(&of_fixture("chatml")), qwen),
        ("SmolLM2", chatml(SMOLLM2), &qwen.replace("a helpful assistant.", "helpful.")),
        (
            "Llama 2",
            byte_level(&of_fixture("llama2"), ["<s>", "</s>"], &["<s>", "</s>"]),
            "<s>[INST] One? [/INST][[ The first. </s>]]<s>[INST] Two? [/INST][[ The end.\nOf it. </s>]]",
        ),
        (
            "Mistral",
            byte_level(MISTRAL, ["<s>", "</s>"], &["<s>", "</s>"]),
            "<s>[INST] One? [/INST][[ The first.</s>]][INST] Two? [/INST][[ The end.\nOf it.</s>]]",
        ),
        (
            "TinyLlama",
            byte_level(TINYLLAMA, ["<s>", "</s>"], &["<s>", "</s>"]),
            "<|user|>\nOne?</s>\n<|assistant|>\n[[The first.</s>]]\n<|user|>\nTwo?</s>\n<|assistant|>\n\
             [[The end.\nOf it.</s>]]",
        ),
        (
            // As in llama.cpp, text after a special token gets a leading space.
            "Mistral in a GGUF file",
            sentencepiece(MISTRAL),
            "<s> [INST] One? [/INST][[ The first.</s>]] [INST] Two? [/INST][[ The end.\nOf it.</s>]]",
        ),
        (
            "TinyLlama in a GGUF file",
            sentencepiece(TINYLLAMA),
            "<|user|>\nOne?</s> \n<|assistant|>\n[[The first.</s>]] \n<|user|>\nTwo?</s> \n<|assistant|>\n\
             [[The end.\nOf it.</s>]]",
        ),
    ] {
        assert_eq!(learned(&tokenizer, &turns(&TWO)), [expected], "{name}");
    }
}

#[test]
fn a_system_prompt_tools_and_a_last_question_are_read() {
    let list = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")];
    assert_eq!(
        learned(&chatml(SMOLLM2), &turns(&list)),
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]"
        ]
    );
    let list = [("user", "One?"), ("assistant", "a"), ("tool", "b"), ("assistant", "c")];
    let mut list = turns(&list);
    list[1].learned = false;
    let expected =
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n<|im_start|>assistant\n[[c<|im_end|>]]";
    assert!(learned(&chatml(SMOLLM2), &list)[0].ends_with(expected));
    assert!(examples(&chatml(SMOLLM2), &list[..3]).is_empty());
    assert!(examples(&chatml(SMOLLM2), &[]).is_empty());
}

#[test]
fn short_answers_and_those_that_hold_markers_end_where_the_template_ends_them() {
    for content in ["end", "m", "", " ", "<|im_end|>", "a <|im_end|>\n<|im_end|> b", "\n\nlines", "  indented\n"] {
        let list = turns(&[("user", "One?"), ("assistant", content), ("user", "Two?"), ("assistant", "Yes.")]);
        let found = learned(&chatml(SMOLLM2), &list);
        let all = found.concat();
        assert!(all.contains(&format!("assistant\n[[{content}<|im_end|>]]")), "{content:?}: {all}");
        assert!(all.ends_with("assistant\n[[Yes.<|im_end|>]]"), "{content:?}: {all}");
    }
}

#[test]
fn a_template_that_rewrites_past_turns_gives_one_example_per_turn() {
    let open = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(
        learned(&chatml(QWEN3), &turns(&TWO)),
        [
            format!("{open}[[<think>\n\n</think>\n\nThe first.<|im_end|>]]"),
            format!(
                "{open}The first.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n\
                 [[<think>\n\n</think>\n\nThe end.\nOf it.<|im_end|>]]"
            ),
        ]
    );
}

#[test]
fn templates_that_cannot_teach_are_refused_by_name() {
    let markers = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}";
    let endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}";
    let counting = markers.replace("{{ m.role }}: ", "{{ m.content | length }} ");
    let counting = format!("{counting}{{% if add_generation_prompt %}}<|im_start|>Answer: {{% endif %}}");
    for (template, words) in [
        (endless, &["without an end token", "expected one of [<|im_end|>]", "found \"The first.\"", "tokenizer.json"]),
        (silent, &["turn 2: `content`: expected the chat template to print it", "found \"The first.\"", "", ""]),
        (&counting, &["when the answer's text changes", "expected \" \"", "found \"0 The first.", "tokenizer.json"]),
        (MISTRAL, &["roles must alternate", "", "", ""]),
    ] {
        let list = if template == MISTRAL { &TWO[1..] } else { &TWO };
        let error = format!("{:#}", encode(&chatml(template), &turns(list)).unwrap_err());
        assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
    }
    // A prompt that differs from the beginning of an answer's turn is what `chat` sends, so it is learned after it.
    let shifted = format!("{markers}{{% if add_generation_prompt %}}<|im_start|>Answer: {{% endif %}}");
    let expected = "<|im_start|>user: One?<|im_end|><|im_start|>Answer: [[The first.<|im_end|>]]";
    assert_eq!(learned(&chatml(&shifted), &turns(&TWO[..2])), [expected]);
}

#[test]
fn a_question_and_its_answer_are_the_same_tokens_as_a_row_and_as_a_conversation() {
    for tokenizer in [llama3(), chatml(&of_fixture("chatml")), chatml(SMOLLM2)] {
        let row = RowContent::Answer { prompt: vec![Message::new("user", "One?")], answer: "The first.".to_owned() };
        let found = of_row(&tokenizer, &row, Learn::All).unwrap().examples;
        assert_eq!(found, examples(&tokenizer, &turns(&TWO[..2])));
        // They are also the tokens of the prompt and of the answer with its end token, encoded separately.
        let prompt = crate::model::apply_chat_template(&tokenizer, &[Message::new("user", "One?")]).unwrap();
        let answer = tokenizer.encode(&format!("The first.{}", tokenizer.eos_token().unwrap()), false).unwrap();
        assert_eq!(found, [Example::new(&prompt, &answer, usize::MAX)]);
    }
    // Such a row also ends where the template writes no end token.
    let endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let row = RowContent::Answer { prompt: vec![Message::new("user", "One?")], answer: "The first.".to_owned() };
    let tokenizer = chatml(endless);
    let found = of_row(&tokenizer, &row, Learn::All).unwrap().examples;
    assert_eq!(
        mark_learned(&tokenizer, &found[0], "[[", "]]").unwrap(),
        "user: One?\nassistant: [[The first.<|im_end|>]]"
    );
}

#[test]
fn the_last_answer_alone_can_be_learned() {
    let conversation = turns(&TWO).into();
    let found = encode_conversation(&llama3(), &conversation, Learn::Last, MissingEnd::Refuse).unwrap().examples;
    let text = mark_learned(&llama3(), &found[0], "[[", "]]").unwrap();
    assert!(text.contains("The first.<|eot_id|><|start") && text.ends_with("[[The end.\nOf it.<|eot_id|>]]"), "{text}");
    assert_eq!((found.len(), text.matches("[[").count()), (1, 1));
}
