"""What a user of OpenAI's own client sees of a gateway, as one JSON object; for `test_gateway`.

It runs in the gateway's virtual environment, which has that client:

    .venv-cluster/bin/python tests/serve/vllm/openai_client.py http://127.0.0.1:30000
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MESSAGES: Any = [{"role": "user", "content": "Count from one to ten, in words."}]
GREEDY: Any = {"temperature": 0.0, "max_completion_tokens": 16}
SCHEMA: Any = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def main(url: str) -> dict[str, Any]:
    """Every request of the test, and what came back."""
    openai: Any = importlib.import_module("openai")  # which type checks run without
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def chat(**fields: Any) -> Any:
        values = {"model": model, "messages": MESSAGES, **GREEDY, **fields}
        return client.chat.completions.create(**values)

    whole = chat()
    text = whole.choices[0].message.content
    stream = chat(stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    scored = chat(logprobs=True, top_logprobs=3).choices[0]
    several = chat(n=3, temperature=1.0, seed=7)
    again = chat(n=3, temperature=1.0, seed=7)
    kept = chat(response_format=FORMAT, max_completion_tokens=200, temperature=1.0, seed=3)
    stop = text[4:6]
    stopped = chat(stop=[stop]).choices[0]
    return {
        "text": text,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(),
        "streamed": "".join(p.choices[0].delta.content or "" for p in parts if p.choices),
        "stream_finish": [p.choices[0].finish_reason for p in parts if p.choices][-1],
        "stream_usage": [p.usage.model_dump() for p in parts if p.usage][-1],
        "logprobs": [
            {
                "token": each.token,
                "logprob": each.logprob,
                "top": [t.logprob for t in each.top_logprobs],
            }
            for each in scored.logprobs.content
        ],
        "several": [choice.message.content for choice in several.choices],
        "again": [choice.message.content for choice in again.choices],
        "kept": kept.choices[0].message.content,
        "kept_finish": kept.choices[0].finish_reason,
        "stop": stop,
        "stopped": stopped.message.content,
        "stopped_finish": stopped.finish_reason,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
