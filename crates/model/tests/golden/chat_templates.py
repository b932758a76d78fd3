"""Records what transformers makes of chat templates: golden/chat/*.jinja -> golden/chat/cases.json.

    pip install transformers jinja2
    python chat_templates.py                    # the templates in this folder
    python chat_templates.py FOLDER > more.json  # others, for CONSORT_TEST_CHAT_CASES

The templates here are ours, written with the constructs that the families' own templates use.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

os.environ["TZ"] = "UTC"
time.tzset()

from transformers.utils import chat_template_utils  # noqa: E402

# The day that `strftime_now` sees, here and in tests/chat_templates.rs.
NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & \"here\": 5 > 3, l'été ☀",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city"},
                "days": {"type": "integer", "minimum": 1, "default": 1.5, "enum": [1, 2, 1e20, 0.00001]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "Now", "parameters": {"type": "object", "properties": {}}}}


def call(name, arguments, id="abcdefghi"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "Hello, who are you?"}
ANSWER = {"role": "assistant", "content": " I am a test.\n"}
SYSTEM = {"role": "system", "content": "Be brief. "}
AGAIN = {"role": "user", "content": "  And\n\tnow? <b>&amp;\"é\" 👩‍👩‍👧 \n"}

CONVERSATIONS = {
    "question": dict(messages=[USER], add_generation_prompt=True),
    "no generation prompt": dict(messages=[USER, ANSWER]),
    "system": dict(messages=[SYSTEM, USER], add_generation_prompt=True),
    "several turns": dict(messages=[SYSTEM, USER, ANSWER, AGAIN], add_generation_prompt=True),
    "tools": dict(messages=[SYSTEM, USER], tools=[WEATHER, CLOCK], add_generation_prompt=True),
    "a call and its result": dict(
        messages=[
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Oslo", "days": 2})]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "{\"t\": -3.5}"},
        ],
        tools=[WEATHER],
        add_generation_prompt=True,
    ),
    "two calls": dict(
        messages=[
            USER,
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call("get_time", {}), call("get_weather", {"city": "Ürümqi \"x\""}, "123456789")]},
            {"role": "tool", "content": "12:00", "tool_call_id": "abcdefghi"},
            {"role": "tool", "content": "sun", "tool_call_id": "123456789"},
            {"role": "assistant", "content": "Noon, sunny."},
            AGAIN,
        ],
        tools=[WEATHER, CLOCK],
        add_generation_prompt=True,
    ),
    "thoughts": dict(
        messages=[
            USER,
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi!"},
            AGAIN,
            {"role": "assistant", "content": "<think>\nhm, again\n</think>\n\nYes."},
        ],
    ),
    "thinking off": dict(messages=[USER], add_generation_prompt=True, variables={"enable_thinking": False}),
    "a variable": dict(messages=[SYSTEM, USER], add_generation_prompt=True, tools=[CLOCK], variables={"date_string": "12 Dec 1999", "tools_in_user_message": False}),
    "parts": dict(messages=[{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}], add_generation_prompt=True),
    "assistant first": dict(messages=[ANSWER, USER]),
    "two users": dict(messages=[USER, USER]),
    "no content": dict(messages=[{"role": "user"}]),
    "null content": dict(messages=[{"role": "user", "content": None}]),
    "extra fields": dict(messages=[{"role": "user", "content": "a b", "name": "Ann"}, {"role": "skip", "content": "?"}, {"role": "tool", "content": ["x", "y"]}, {"role": "user", "content": {"type": "z"}}]),
}

BOS, EOS = "<s>", "</s>"


def render(template, conversation):
    context = dict(conversation.get("variables", {}))
    compiled = chat_template_utils._compile_jinja_template(template)
    return compiled.render(
        messages=conversation["messages"],
        tools=conversation.get("tools"),
        documents=None,
        add_generation_prompt=conversation.get("add_generation_prompt", False),
        bos_token=BOS,
        eos_token=EOS,
        **context,
    )


def main():
    chat_template_utils.datetime = Frozen
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "chat"
    recorded = []
    for path in sorted(folder.glob("*.jinja")):
        template = path.read_text()
        cases = []
        for name, conversation in CONVERSATIONS.items():
            case = {"name": name, **conversation}
            try:
                case["text"] = render(template, conversation)
            except Exception as error:  # What a template raises, and what Python does.
                case["error"] = str(error) if type(error).__name__ == "TemplateError" else ""
            cases.append(case)
        recorded.append({"template": path.name, "source": template if len(sys.argv) > 1 else None, "cases": cases})
    text = json.dumps(recorded, ensure_ascii=False, indent=1)
    if len(sys.argv) > 1:
        print(text)
    else:
        (folder / "cases.json").write_text(text + "\n")


main()
