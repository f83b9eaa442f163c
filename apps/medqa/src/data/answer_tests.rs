//! Learned answers with templates in the shapes of the families that people train.

use crate::data::{
    Conversation, EncodedConversation, RowContent, check::mark_learned, encode_row, test_tokenizers::byte_level,
};
use crate::{recipe::Learn, schema::Schema};
use anyhow::Result;
use burn_llama::Tokenizer;
use serde_json::{Value, json};

/// Template like that of Qwen2.5's base models, whose EOS token is `<|endoftext|>`.
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// Template like DeepSeek-R1-Distill's: the prompt opens a thought, and past answers lose theirs.
const R1: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m['content'] }}\
    {% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}\
    {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}";
/// Template like QwQ's, which also trims the answer.
const QWQ: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}\
    {{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}";
/// Template like Qwen3's: it writes thoughts after the last question and drops earlier ones; it knows tools, and an
/// argument that turns thinking off.
const QWEN3: &str = "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}\
    {% endif %}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}\
    {% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set content = m.content or '' %}\
    {% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}\
    {% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
    {% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}\
    {% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}\
    {{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ content }}\
    {% for call in m.tool_calls or [] %}{% set f = call.function %}{{ '\\n<tool_call>\\n{\"name\": \"' + f.name + '\", \"arguments\": ' }}\
    {% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}{% endfor %}\
    {{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
    {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}";
/// Template like those of Mistral v3 and Nemo: the system text stands in the last question.
const MISTRAL: &str = "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}\
    {% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}\
    {% if loop.last %}{{ system }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";
/// Template like Gemma's: the assistant has another name, texts are trimmed, and the end of a turn is not EOS.
const GEMMA: &str = "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + \
    m.content | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

fn chatml(template: &str) -> Tokenizer {
    byte_level(template, ["<|endoftext|>", "<|endoftext|>"], &["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
}

fn r1() -> Tokenizer {
    let names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"];
    byte_level(R1, [names[0], names[1]], &names)
}

/// Parses and encodes an OpenAI row.
fn encoded(tokenizer: &Tokenizer, row: &Value) -> Result<EncodedConversation> {
    let schema = Schema { format: crate::schema::Format::Messages, ..Schema::default() };
    encode_row(tokenizer, &crate::data::content::parse_row(row.as_object().unwrap(), &schema)?, Learn::All)
}

/// Returns the examples of a row as texts with the learned tokens in brackets. Each learned part must follow the tokens
/// that `chat` sends.
fn learned(tokenizer: &Tokenizer, row: &Value) -> Vec<String> {
    let found = encoded(tokenizer, row).unwrap().examples;
    let schema = Schema { format: crate::schema::Format::Messages, ..Schema::default() };
    let RowContent::Conversation(Conversation { turns, tools }) =
        crate::data::content::parse_row(row.as_object().unwrap(), &schema).unwrap()
    else {
        panic!("a conversation")
    };
    let messages: Vec<_> = turns.iter().map(|turn| turn.message.clone()).collect();
    for (index, _) in turns.iter().enumerate().filter(|(_, turn)| turn.message.role == "assistant" && turn.learned) {
        let prompt = tokenizer.apply_chat_template(&messages[..index], tools.as_ref(), true).unwrap();
        let follows = |example: &burn_llama::Example| {
            example.ids.starts_with(&prompt) && !example.loss_mask[prompt.len() - 1] && example.loss_mask[prompt.len()]
        };
        assert!(found.iter().any(follows), "{row}: no answer after {:?}", tokenizer.decode(&prompt, false));
    }
    assert!(found.iter().all(|example| tokenizer.eos_ids().contains(example.ids.last().unwrap())), "{row}");
    found.iter().map(|example| mark_learned(tokenizer, example, "[[", "]]").unwrap()).collect()
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

#[test]
fn a_base_model_learns_the_end_token_of_its_template_and_stops_there() {
    let tokenizer = chatml(CHATML);
    let end = tokenizer.token_to_id("<|im_end|>");
    assert_eq!((tokenizer.end_of_turn(), tokenizer.eos()), (end, tokenizer.token_to_id("<|endoftext|>")));
    assert!(tokenizer.eos_ids().contains(&end.unwrap()) && tokenizer.eos_ids().contains(&tokenizer.eos().unwrap()));
    let row = json!({"messages": [user("Hi"), assistant("Yes.")]});
    let prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(learned(&tokenizer, &row), [format!("{prompt}[[Yes.<|im_end|>]]")]);
    let qa = RowContent::Answer { prompt: vec![burn_llama::Message::new("user", "Hi")], answer: "Yes.".into() };
    assert_eq!(encode_row(&tokenizer, &qa, Learn::All).unwrap(), encoded(&tokenizer, &row).unwrap());
    // Another end token replaces the template's.
    let tokenizer = tokenizer.with_end_of_turn("<|endoftext|>").unwrap();
    assert_eq!(learned(&tokenizer, &row), [format!("{prompt}[[Yes.<|endoftext|>]]")]);
    let error = chatml(CHATML).with_end_of_turn("<|end|>").unwrap_err().to_string();
    assert!(error.contains("\"<|end|>\": expected a token of the vocabulary"), "{error}");
}

#[test]
fn a_thought_that_the_prompt_opens_is_learned_with_its_end_and_the_answer() {
    let open = "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>\n";
    let field = |key: &str, value: &str| json!({"role": "assistant", "content": "4.", key: value});
    for (answer, expected) in [
        (assistant("<think>\nTwo  and two.\n</think>\n\n4."), "Two  and two.\n</think>\n\n4."),
        (assistant("Two  and two.</think>4."), "Two  and two.</think>4."),
        (field("reasoning_content", "\nTwo and two.\n"), "Two and two.\n</think>\n\n4."),
        (field("thinking", "Two\nand two."), "Two\nand two.\n</think>\n\n4."),
        (field("reasoning", "Two."), "Two.\n</think>\n\n4."),
        (assistant("4."), "\n</think>\n\n4."),
    ] {
        let row = json!({"messages": [user("2+2?"), answer]});
        assert_eq!(learned(&r1(), &row), [format!("{open}[[{expected}<｜end▁of▁sentence｜>]]")], "{row}");
        let open = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n";
        assert_eq!(learned(&chatml(QWQ), &row), [format!("{open}[[{expected}<|im_end|>]]")], "{row}");
    }
    // A past answer is read as the template writes it.
    let row =
        json!({"messages": [user("a"), assistant("<think>\nA thought.\n</think>\n\nb"), user("c"), assistant("d")]});
    let found = learned(&r1(), &row);
    assert_eq!(found.len(), 2);
    assert!(
        found[1]
            .contains("<｜Assistant｜>\n\nb<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>\n[[\n</think>\n\nd<")
    );
    assert_eq!(encoded(&r1(), &row).unwrap().omitted, 1);
    // A row of one question and one answer is learned in the same way.
    let qa = RowContent::Answer { prompt: vec![burn_llama::Message::new("user", "2+2?")], answer: "4.".into() };
    let row = json!({"messages": [user("2+2?"), assistant("4.")]});
    assert_eq!(encode_row(&r1(), &qa, Learn::All).unwrap(), encoded(&r1(), &row).unwrap());
}

#[test]
fn a_thought_that_the_template_writes_is_learned_as_it_is_written() {
    let tokenizer = chatml(QWEN3);
    let with = |key: &str| json!({"role": "assistant", "content": "4.", key: "Two and two."});
    let open = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n";
    let expected = [format!("{open}[[<think>\nTwo and two.\n</think>\n\n4.<|im_end|>]]")];
    for answer in [
        with("reasoning_content"),
        with("thinking"),
        with("reasoning"),
        assistant("<think>\nTwo and two.\n</think>\n\n4."),
    ] {
        assert_eq!(learned(&tokenizer, &json!({"messages": [user("2+2?"), answer]})), expected);
    }
    let row = json!({"messages": [user("2+2?"), assistant("4.")]});
    assert_eq!(learned(&tokenizer, &row), [format!("{open}[[<think>\n\n</think>\n\n4.<|im_end|>]]")]);
    // Keys that the template does not print are refused by name.
    let error =
        format!("{:#}", encoded(&tokenizer, &json!({"messages": [user("2+2?"), with("rationale")]})).unwrap_err());
    assert!(error.starts_with("turn 2: `rationale`: expected the chat template to print it"), "{error}");
    assert!(error.contains("\"Two and two.\""), "{error}");
    let empty = json!({"role": "assistant", "content": "4.", "thinking": " ", "name": null, "score": 3, "weight": 1});
    assert_eq!(encoded(&tokenizer, &json!({"messages": [user("2+2?"), empty]})).unwrap().omitted, 0);
    // An earlier thought is left out of later prompts, and counted.
    let row = json!({"messages": [user("2+2?"), with("reasoning_content"), user("3+3?"), assistant("6.")]});
    assert_eq!(learned(&tokenizer, &row).len(), 2);
    assert_eq!(encoded(&tokenizer, &row).unwrap().omitted, 1);
    // Without thinking, the prompt holds the empty thought, and the answer alone is learned.
    let template = tokenizer.parse_chat_template(QWEN3).unwrap();
    let arguments = json!({"enable_thinking": false});
    let tokenizer = tokenizer.with_chat_template(template.with_arguments(arguments.as_object().unwrap()).unwrap());
    let row = json!({"messages": [user("2+2?"), assistant("4.")]});
    assert_eq!(learned(&tokenizer, &row), [format!("{open}<think>\n\n</think>\n\n[[4.<|im_end|>]]")]);
}

#[test]
fn calls_of_tools_are_learned() {
    let arguments = json!({"city": "Bonn \"am\" Rhein", "days": 2});
    let call = |arguments: Value| json!([{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]);
    let row = |content: Value, arguments: Value| {
        json!({"tools": [{"type": "function", "function": {"name": "weather"}}], "messages": [
            user("Rain?"), {"role": "assistant", "content": content, "tool_calls": call(arguments)},
            {"role": "tool", "content": "no", "tool_call_id": "c1"}, assistant("No rain."),
        ]})
    };
    let called = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Bonn \"am\" Rhein", "days": 2}}
</tool_call><|im_end|>"#;
    let text = r#"{"city": "Bonn \"am\" Rhein", "days": 2}"#;
    for row in [row(Value::Null, arguments.clone()), row(json!(""), json!(text))] {
        let found = learned(&chatml(QWEN3), &row).concat();
        assert!(found.contains(&format!("assistant\n[[<think>\n\n</think>\n\n\n{called}]]")), "{found}");
        assert!(found.contains("[[<think>\n\n</think>\n\nNo rain.<|im_end|>]]"), "{found}");
        assert!(found.starts_with(
            "<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"weather\"}}<|im_end|>"
        ));
        let error = format!(
            "{:#}",
            encoded(&chatml(&CHATML.replace("m['content']", "(m['content'] or 'x')")), &row).unwrap_err()
        );
        assert!(error.starts_with("turn 2: `tool_calls`: "), "{error}");
    }
}

#[test]
fn a_system_text_that_stands_in_the_last_question_is_read_there() {
    let tokenizer = byte_level(MISTRAL, ["<s>", "</s>"], &["<s>", "</s>", "[INST]", "[/INST]"]);
    let row = json!({"messages": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c"), assistant("d")]});
    assert_eq!(
        learned(&tokenizer, &row),
        ["<s>[INST] Be brief.\n\na[/INST][[ b</s>]]", "<s>[INST] a[/INST] b</s>[INST] Be brief.\n\nc[/INST][[ d</s>]]"]
    );
}

#[test]
fn a_trimmed_answer_is_learned_up_to_the_end_of_its_turn() {
    let names = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"];
    let tokenizer = byte_level(GEMMA, [names[0], names[1]], &names);
    let row = json!({"messages": [user(" a\n"), assistant("\n b  "), user("c"), assistant("<end_of_turn>")]});
    assert_eq!(
        learned(&tokenizer, &row),
        ["<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n[[b<end_of_turn>]]\n<start_of_turn>user\nc\
          <end_of_turn>\n<start_of_turn>model\n[[<end_of_turn><end_of_turn>]]"]
    );
    // The answer that spells the token is text; the template's own token ends it.
    let example = encoded(&tokenizer, &row).unwrap().examples.remove(0);
    let end = tokenizer.end_of_turn().unwrap();
    assert_eq!(example.ids.iter().filter(|id| **id == end).count(), 4);
}

#[test]
fn an_end_token_after_the_end_of_the_last_turn_is_not_learned() {
    let phi = "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}";
    let names = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"];
    let tokenizer = byte_level(phi, [names[0], names[1]], &names);
    let row = json!({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]});
    let expected = "<|user|>\na<|end|>\n<|assistant|>\n[[b<|end|>]]\n<|user|>\nc<|end|>\n<|assistant|>\n[[d<|end|>]]";
    assert_eq!(learned(&tokenizer, &row), [expected]);
}

#[test]
fn a_template_may_leave_out_the_text_beside_a_call() {
    let llama = "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}\
        {% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}";
    let names = ["<s>", "<|eot|>", "<|start|>"];
    let tokenizer = byte_level(llama, [names[0], names[1]], &names);
    let row = |content: &str| {
        let call = json!([{"id": "c1", "function": {"name": "weather"}}]);
        json!({"messages": [user("Rain?"), {"role": "assistant", "content": content, "tool_calls": call}]})
    };
    let expected = "<|start|>user\nRain?<|eot|><|start|>assistant\n[[{\"name\": \"weather\"}<|eot|>]]";
    assert_eq!(learned(&tokenizer, &row("")), [expected]);
    let error = format!("{:#}", encoded(&tokenizer, &row("I look.")).unwrap_err());
    assert!(error.starts_with("turn 2: `content`: ") && error.contains("\"I look.\""), "{error}");
}

#[test]
fn control_tokens_that_the_template_searches_answers_for_are_found_there_and_nowhere_else() {
    let names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"];
    let tokenizer = byte_level(QWEN3, ["<|endoftext|>", "<|im_end|>"], &names);
    let row = |question: &str| json!({"messages": [user(question), assistant("<think>\nTwo and two.\n</think>\n\n4.<|im_end|>")]});
    let question = "Is </think> a tag?";
    let expected = format!(
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n[[<think>\nTwo and two.\n</think>\n\n4.<|im_end|>\
         <|im_end|>]]"
    );
    assert_eq!(learned(&tokenizer, &row(question)), [expected]);
    let ids = encoded(&tokenizer, &row(question)).unwrap().examples.remove(0).ids;
    let count = |token: &str| ids.iter().filter(|id| Some(**id) == tokenizer.token_to_id(token)).count();
    assert_eq!(names.map(count), [0, 2, 2, 1, 1]);
}

/// A prompt may depend on the question, as that of Nemotron-Nano does.
#[test]
fn a_template_sees_the_question_that_it_answers() {
    let source = CHATML.replace(
        "{{ '<|im_start|>assistant\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}{{ '<think></think>' if '/no_think' in messages[-1].content else '<think>\\n' }}",
    );
    let tokenizer = chatml(&source);
    let row = |question: &str, thought: Option<&str>| {
        let answer = json!({"role": "assistant", "content": "4", "reasoning_content": thought});
        json!({"messages": [user(question), answer]})
    };
    for (question, thought, expected) in [
        ("2+2? /no_think", None, "<think></think>[[4<|im_end|>]]"),
        ("2+2?", Some("2+2"), "<think>\n[[2+2\n</think>\n\n4<|im_end|>]]"),
    ] {
        let found = encoded(&tokenizer, &row(question, thought)).unwrap().examples;
        let text = mark_learned(&tokenizer, &found[0], "[[", "]]").unwrap();
        assert!(text.ends_with(expected), "{question}: {text}");
    }
}

/// Nothing is learned inside a thought that the prompt opens and the template closes.
#[test]
fn an_answer_that_does_not_follow_its_prompt_is_refused() {
    let source = CHATML
        .replace(
            "m['content'] + '<|im_end|>'",
            "('<reason></reason>' if m.role == 'assistant' else '') + m['content'] + '<|im_end|>'",
        )
        .replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<reason>\\n' }}");
    let row = json!({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]});
    let error = encoded(&chatml(&source), &row).unwrap_err();
    assert!(format!("{error:#}").contains("</reason>"), "{error:#}");
}
