"""Drives a running replica with OpenAI's own Python client, through everything the API promises.

    python test_api.py --url http://127.0.0.1:8080            # needs: pip install openai jsonschema
    python test_api.py --url http://127.0.0.1:8080 --key sk-… # a server with a key: refusals without it, too

Each `check_…` function is one claim. They need a real model with a chat template, but nothing of its taste: what a
small model says is not checked, only that what was asked for was obeyed. Ends with status 1 if any check failed.
"""

import argparse
import json
import sys
import threading
import traceback

import jsonschema
import openai
from openai import OpenAI

ASK = [{"role": "user", "content": "Name three colours and say where each is found."}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/zone"}},
            "required": ["zone"],
            "additionalProperties": False,
            "$defs": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
        },
    },
}


class Server:
    """The server under test and the name of its model."""

    def __init__(self, url, key):
        self.url = url
        self.key = key
        self.client = OpenAI(base_url=url + "/v1", api_key=key or "none", max_retries=0, timeout=300)
        self.model = self.client.models.list().data[0].id

    def chat(self, **fields):
        fields = {"model": self.model, "messages": ASK, "max_tokens": 24, "seed": 7} | fields
        return self.client.chat.completions.create(**fields)

    def complete(self, **fields):
        fields = {"model": self.model, "prompt": "The capital of France is", "max_tokens": 8, "seed": 7} | fields
        return self.client.completions.create(**fields)

    def tokenize(self, text):
        body = self.client.post(self.url + "/tokenize", cast_to=object, body={"prompt": text})
        return body["tokens"]


def refused(call, error, param=None, code=None):
    """`call` must raise `error`; its envelope must name `param` and `code`."""
    try:
        call()
    except error as caught:
        assert param is None or caught.param == param, (caught.param, caught.message)
        assert code is None or caught.code == code, (caught.code, caught.message)
        return caught
    raise AssertionError(f"{error.__name__} was expected")


def check_models(server):
    card = server.client.models.retrieve(server.model)
    assert card.id == server.model and card.object == "model"
    refused(lambda: server.client.models.retrieve("nobody/nothing"), openai.NotFoundError, code="model_not_found")
    refused(lambda: server.chat(model="gpt-nothing"), openai.NotFoundError, "model", "model_not_found")


def check_chat(server):
    answer = server.chat()
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint and answer.model == server.model
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    fields = {"temperature": 0, "stop": ["e"], "messages": ASK + [{"role": "user", "content": "Please. " * 40}]}
    server.chat(**fields)
    again = server.chat(**fields).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens, "a stop string changes nothing of it"


def check_streaming(server):
    whole = server.chat()
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1
    assert all(c.system_fingerprint == whole.system_fingerprint for c in chunks)
    assert all(c.usage is None for c in server.chat(stream=True)), "usage only where it was asked for"


def check_stream_helper(server):
    """The client's own accumulator agrees with a whole answer (it takes no answer that was cut at a length)."""
    fields = {"model": server.model, "messages": ASK, "max_tokens": 400, "seed": 7, "stop": ["e"]}
    with server.client.chat.completions.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == server.chat(**fields).choices[0].message.content


def check_seed(server):
    def say(**fields):
        return server.chat(temperature=1.2, **fields).choices[0].message.content

    assert say(seed=1) == say(seed=1)
    assert len({say(seed=seed) for seed in range(4)}) > 1
    assert server.chat(temperature=0, seed=1).choices[0].message.content == server.chat(
        temperature=0, seed=2
    ).choices[0].message.content, "greedy needs no seed"


def check_n(server):
    answer = server.chat(n=3, temperature=1.3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) > 1
    assert answer.choices[0].message.content == server.chat(temperature=1.3).choices[0].message.content
    texts = {}
    for chunk in server.chat(n=3, temperature=1.3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert [texts[i] for i in range(3)] == [c.message.content for c in answer.choices]


def check_stop(server):
    whole = server.chat(temperature=0, max_tokens=40).choices[0].message.content
    assert len(whole) > 24, whole
    stop = whole[12:20]
    cut = server.chat(temperature=0, max_tokens=40, stop=[stop, "\0never"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = server.chat(temperature=0, max_tokens=40, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole[: whole.index(stop)]


def check_limits(server):
    answer = server.chat(max_tokens=3, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    answer = server.client.chat.completions.create(
        model=server.model, messages=ASK, max_completion_tokens=2, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 2


def check_logprobs(server):
    answer = server.chat(logprobs=True, top_logprobs=4, temperature=0)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == answer.choices[0].message.content
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        best = token.top_logprobs[0]
        assert best.bytes == token.bytes, "greedy takes the likeliest"
        assert abs(best.logprob - token.logprob) < 1e-5
        falling = [t.logprob for t in token.top_logprobs]
        assert falling == sorted(falling, reverse=True)
    streamed = []
    for chunk in server.chat(logprobs=True, top_logprobs=4, temperature=0, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content


def check_logit_bias(server):
    [token] = server.tokenize(" blue")[-1:]
    answer = server.chat(logit_bias={str(token): 100}, max_tokens=4, temperature=0, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == " blue" * 4, answer.choices[0].message.content
    first = server.complete(temperature=0, max_tokens=1, logprobs=1)
    [banned] = server.tokenize(first.choices[0].text)[-1:]
    other = server.complete(temperature=0, max_tokens=1, logit_bias={str(banned): -100})
    assert other.choices[0].text != first.choices[0].text


def check_json_object(server):
    for temperature in (0, 1):
        answer = server.chat(
            messages=[{"role": "user", "content": "Describe a cat in JSON with two short fields."}],
            response_format={"type": "json_object"},
            temperature=temperature,
            max_tokens=400,
        )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)
        else:
            assert answer.choices[0].message.content.lstrip().startswith("{")


def check_json_schema(server):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    for seed in range(3):
        answer = server.chat(response_format=form, seed=seed, max_tokens=200)
        assert answer.choices[0].finish_reason == "stop", answer.choices[0]
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    caught = refused(lambda: server.chat(response_format=broken), openai.BadRequestError)
    assert caught.param.startswith("response_format"), caught.param


def check_tools_forced(server):
    tools = [WEATHER, TIME]
    by_name = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    named = {"type": "function", "function": {"name": "get_time"}}
    for choice, allowed in (("required", set(by_name)), (named, {"get_time"})):
        fields = {"tools": tools, "tool_choice": choice, "max_tokens": 200, "parallel_tool_calls": False}
        answer = server.chat(**fields)
        [call] = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls", answer.choices[0]
        assert call.type == "function" and call.id and call.function.name in allowed
        jsonschema.validate(json.loads(call.function.arguments), by_name[call.function.name])

        name, arguments, reason = "", "", None
        for chunk in server.chat(stream=True, **fields):
            reason = chunk.choices[0].finish_reason or reason
            for delta in chunk.choices[0].delta.tool_calls or []:
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
        assert (name, arguments, reason) == (call.function.name, call.function.arguments, "tool_calls")

        follow_up = ASK + [
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "12:00"},
        ]
        assert server.chat(messages=follow_up, tools=tools).choices[0].finish_reason


def check_tools_with_format(server):
    """An answer is calls, or JSON in the format; never both, never other text."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": schema}}
    questions = ["Name a colour.", "What is the weather in Paris in celsius? Call get_weather."]
    for question in questions:
        for seed in range(3):
            fields = {
                "messages": [{"role": "user", "content": question}],
                "tools": [WEATHER, TIME],
                "response_format": form,
                "max_tokens": 400,
                "seed": seed,
            }
            choice = server.chat(**fields).choices[0]
            if choice.finish_reason == "tool_calls":
                assert not choice.message.content, choice
                for call in choice.message.tool_calls:
                    tool = WEATHER if call.function.name == "get_weather" else TIME
                    jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
            else:
                assert choice.finish_reason == "stop" and not choice.message.tool_calls, choice
                jsonschema.validate(json.loads(choice.message.content), schema)
            chunks = [c.choices[0] for c in server.chat(stream=True, **fields)]
            assert "".join(c.delta.content or "" for c in chunks) == (choice.message.content or "")
            assert chunks[-1].finish_reason == choice.finish_reason
    fields = {"tools": [WEATHER, TIME], "response_format": form, "max_tokens": 200}
    called = server.chat(tool_choice="required", parallel_tool_calls=False, **fields).choices[0]
    assert called.finish_reason == "tool_calls" and not called.message.content
    said = server.chat(tool_choice="none", **fields).choices[0]
    jsonschema.validate(json.loads(said.message.content), schema)


def check_tools_auto(server):
    for choice in ("auto", "none"):
        choice_answer = server.chat(tools=[WEATHER], tool_choice=choice).choices[0]
        assert choice_answer.message.content or choice_answer.message.tool_calls
        if choice == "none":
            assert not choice_answer.message.tool_calls
    refused(lambda: server.chat(tool_choice="required"), openai.BadRequestError, "tool_choice")


def check_completions(server):
    answer = server.complete(temperature=0)
    assert answer.object == "text_completion" and answer.choices[0].text
    ids = server.tokenize("The capital of France is")
    assert server.complete(prompt=ids, temperature=0).choices[0].text == answer.choices[0].text
    several = server.complete(prompt=["The capital of France is", "One, two,"], temperature=0, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == answer.choices[0].text
    lists = server.complete(prompt=[ids, ids[:3]], temperature=0)
    assert lists.choices[0].text == answer.choices[0].text
    streamed = "".join(c.choices[0].text for c in server.complete(temperature=0, stream=True) if c.choices)
    assert streamed == answer.choices[0].text
    refused(lambda: server.complete(suffix="."), openai.BadRequestError, "suffix")
    refused(lambda: server.complete(best_of=3), openai.BadRequestError, "best_of")


def check_echo(server):
    prompt = "The capital of France is"
    ids = server.tokenize(prompt)
    answer = server.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=4, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(ids) + answer.usage.completion_tokens or choice.finish_reason == "stop"
    assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
    assert len(logprobs.top_logprobs) == len(logprobs.tokens) == len(logprobs.text_offset)
    scored = server.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].text == prompt
    assert scored.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[: len(ids)]


def check_penalties_and_samplers(server):
    fields = {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    body = {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1}
    one = server.chat(**fields, extra_body=body)
    assert one.choices[0].message.content == server.chat(**fields, extra_body=body).choices[0].message.content
    greedy = server.chat(temperature=0).choices[0].message.content
    assert server.chat(temperature=2, extra_body={"top_k": 1}).choices[0].message.content == greedy


def check_continuation(server):
    """What a gateway does when a replica dies: the rest of the answer is the rest of the answer."""
    fields = {"temperature": 0.8, "max_tokens": 20, "stream": True}
    whole, ids = [], []
    for chunk in server.chat(**fields, extra_body={"return_token_ids": True}):
        whole.append((chunk.choices[0].delta.content or "", chunk.choices[0].finish_reason))
        ids.append(chunk.choices[0].model_extra.get("token_ids") or [])
    for cut in (2, len(whole) // 2, len(whole) - 2):
        emitted = [i for part in ids[:cut] for i in part]
        body = {"return_token_ids": True, "consort": {"emitted_token_ids": emitted}}
        rest = [
            (c.choices[0].delta.content or "", c.choices[0].finish_reason)
            for c in server.chat(**fields, extra_body=body)
        ]
        assert rest == whole[cut:], (cut, rest, whole)


def check_content_parts(server):
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    assert server.chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    refused(
        lambda: server.chat(messages=[{"role": "user", "content": image}]),
        openai.BadRequestError,
        "messages[0].content[0].type",
    )


def check_refusals(server):
    for param, value in (("temperature", 3), ("top_p", 2), ("n", 0), ("presence_penalty", 5), ("reasoning_effort", "low"), ("store", True)):
        refused(lambda param=param, value=value: server.chat(**{param: value}), openai.BadRequestError, param)
    refused(lambda: server.chat(max_tokens=10**9), openai.BadRequestError, "max_tokens", "context_length_exceeded")
    refused(lambda: server.chat(extra_body={"temprature": 1}), openai.BadRequestError, "temprature")
    long = [{"role": "user", "content": "word " * 200_000}]
    refused(lambda: server.chat(messages=long), openai.BadRequestError, "messages", "context_length_exceeded")
    refused(lambda: server.client.embeddings.create(model=server.model, input="x"), openai.NotFoundError)


def check_deadline(server):
    header = {"X-Request-Timeout-Ms": "1"}
    caught = refused(
        lambda: server.chat(max_tokens=500, extra_headers=header, extra_body={"ignore_eos": True}),
        openai.InternalServerError,
        code="deadline_exceeded",
    )
    assert caught.status_code == 504


def check_cancel(server):
    """Streams that are dropped halfway leave the server free for the next."""
    for _ in range(5):
        stream = server.chat(stream=True, max_tokens=1000, extra_body={"ignore_eos": True})
        for _, _chunk in zip(range(3), stream):
            pass
        stream.close()
    assert server.chat(max_tokens=2).choices[0].message.content is not None


def check_overload(server):
    """More than the queue holds: some are told to come back later, and those taken are answered."""
    taken, told, odd = [], [], []

    def ask():
        try:
            stream = server.chat(n=16, max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
            taken.append(stream)
        except openai.RateLimitError as error:
            told.append(error)
        except Exception as error:  # noqa: BLE001 anything else is the finding
            odd.append(error)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in taken:
        stream.close()
    assert not odd, odd
    assert taken and told, (len(taken), len(told))
    assert all(int(e.response.headers["retry-after"]) >= 1 and e.code == "overloaded" for e in told)
    for _ in range(100):
        try:
            assert server.chat(max_tokens=2)
            return
        except openai.RateLimitError:
            threading.Event().wait(0.1)
    raise AssertionError("the server stayed busy after everyone had left")


def check_key(server):
    if not server.key:
        return
    for key in ("wrong", server.key + "x"):
        stranger = OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
        refused(stranger.models.list, openai.AuthenticationError, code="invalid_api_key")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="http://HOST:PORT of the replica")
    parser.add_argument("--key", help="its API key, where it has one")
    parser.add_argument("--only", help="run the checks whose names contain this")
    arguments = parser.parse_args()
    server = Server(arguments.url.rstrip("/"), arguments.key)
    checks = [(name[6:], check) for name, check in globals().items() if name.startswith("check_")]
    failed = []
    for name, check in checks:
        if arguments.only and arguments.only not in name:
            continue
        try:
            check(server)
            print(f"ok    {name}", flush=True)
        except Exception:  # noqa: BLE001 every check runs, whatever the one before did
            failed.append(name)
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"all {len(checks)} checks passed with openai {openai.__version__}")


if __name__ == "__main__":
    main()
