"""Compares rendered chat templates with those of transformers, by hand.

    python tests/real/templates.py RENDER DIR...

RENDER is the example `render` of burn-llama, built. DIR holds templates (*.jinja), such as those in the source
distributions of llama-cpp-python (vendor/llama.cpp/models/templates), trl and axolotl. Every template is rendered for
every conversation below with and without a generation prompt, tools and switches of thinking. Texts must be equal; what
jinja2 refuses must be refused. Prints the differences and their number, which is also the exit code (at most 1).
"""

import json
import subprocess
import sys
from datetime import datetime
from itertools import product
from pathlib import Path
from unittest import mock

from transformers.utils import chat_template_utils

TIME = "2024-02-09T23:05:09"
BOS, EOS = "<s>", "</s>"


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASK = turn("user", "What's the weather in Köln & Rome?")
CALLS = [call("weather", {"city": "Köln", "days": 2, "exact": True, "unit": None, "at": {"lat": 1e-5, "list": [1.0, "a"]}},
              id="call00001"), call("time", {}, id="call00002")]
RESULTS = [turn("tool", '{"temp": 7.5}', tool_call_id="call00001", name="weather"),
           turn("tool", "12:00", tool_call_id="call00002", name="time")]
CONVERSATIONS = {
    "question": [ASK],
    "system": [turn("system", " Be brief. \n"), ASK],
    "turns": [turn("system", "Be brief."), ASK, turn("assistant", "  Rain. \n"), turn("user", "And now?\r\nTell me.")],
    "answered": [ASK, turn("assistant", "Rain.\r\n\r\nA lot.")],
    "no system": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")],
    "one call": [ASK, turn("assistant", "", tool_calls=CALLS[:1]), RESULTS[0], turn("assistant", "7.5 °C")],
    "calls": [turn("system", "Use tools."), ASK, turn("assistant", "Let me see.", tool_calls=CALLS), *RESULTS],
    "call without content": [ASK, turn("assistant", None, tool_calls=CALLS[:1]), RESULTS[0]],
    "call in a text": [ASK, turn("assistant", None, tool_calls=[
        call("weather", '{"city": "Rome"}', id="call00001")]), RESULTS[0], turn("assistant", "Sun.")],
    "reasoning": [ASK, turn("assistant", "Rain.", reasoning_content="Clouds.\n\nSo rain."), turn("user", "Sure?")],
    "reasoning last": [ASK, turn("assistant", "Rain.", reasoning_content="Clouds.")],
    "thought in content": [ASK, turn("assistant", "<think>\nClouds.\n</think>\n\nRain."), turn("user", "Sure?")],
    "reasoning and call": [ASK, turn("assistant", "", reasoning_content="Ask.", tool_calls=CALLS[:1]), RESULTS[0]],
    "empty": [turn("system", ""), turn("user", ""), turn("assistant", ""), turn("user", "  ")],
    "awkward": [turn("user", "<b>\"'\\ {{ x }} {% if %} 你好🤧\u200b\u2028\t\x0b<|im_end|>"), turn("assistant", "é\n\n\n")],
    "parts": [turn("user", [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "what?"}]),
              turn("assistant", [{"type": "text", "text": "A cat."}])],
    "roles": [turn("developer", "Obey."), turn("user", "a"), turn("user", "b"), turn("assistant", "c")],
    "assistant first": [turn("assistant", "Hello."), turn("user", "Hi.")],
    "other role": [turn("critic", "Bad."), turn("user", "Hi.")],
    "none": [],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather <of> a city's \"day\".", "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "City", "enum": ["Köln", "Rome"], "default": "Köln"},
            "days": {"type": "integer", "minimum": 0, "default": 1}, "exact": {"type": "boolean", "default": False},
            "items": {"type": "array", "items": {"type": "string"}}, "unit": {"type": ["string", "null"]},
            "at": {"type": "object", "properties": {"lat": {"type": "number", "maximum": 1e16}}, "required": ["lat"]}}},
        "return": {"type": "string"}}},
    {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}}},
]
TOOL_SETS = {"": None, "tools": TOOLS}
SWITCHES = {"": {}, "thinking": {"enable_thinking": True}, "no thinking": {"enable_thinking": False}}


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.fromisoformat(TIME)


def rendered(template, context):
    """The text of transformers, or the error as an exception."""
    try:
        return chat_template_utils._compile_jinja_template(template).render(**json.loads(json.dumps(context)))
    except Exception as error:
        return error


def main():
    render, *folders = sys.argv[1:]
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.jinja"))
    cases = []
    for path, name, tools, switch, prompt in product(files, CONVERSATIONS, TOOL_SETS, SWITCHES, (False, True)):
        context = {
            "messages": CONVERSATIONS[name], "tools": TOOL_SETS[tools], "documents": None,
            "add_generation_prompt": prompt, "bos_token": BOS, "eos_token": EOS, **SWITCHES[switch],
        }
        label = f"{path}: {', '.join(filter(None, [name, tools, switch, 'prompt' if prompt else '']))}"
        cases.append((label, path.read_bytes().decode(), context))
    lines = (json.dumps({"template": text, "time": TIME, "context": context}) for _, text, context in cases)
    answers = subprocess.run([render], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    answers = [json.loads(line) for line in answers.split("\n") if line]
    assert len(answers) == len(cases)
    differ, refused = [], 0
    with mock.patch.object(chat_template_utils, "datetime", Clock):
        for (label, template, context), answer in zip(cases, answers):
            expected = rendered(template, context)
            refused += isinstance(expected, Exception)
            found = answer.get("text")
            if found != (None if isinstance(expected, Exception) else expected):
                differ.append(label)
                print(f"{label}\n  expected {expected!r}\n  found    {found!r} {answer.get('error', '')}")
    print(f"{len(files)} templates, {len(cases)} renderings, of which jinja2 refuses {refused}; {len(differ)} differ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
