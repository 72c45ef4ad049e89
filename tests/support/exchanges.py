"""Exchanges with the gateway: the project's own, and those in a folder of recordings beside it, where there is one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from regolo_rerank import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)

RECORDINGS: Final = Path(__file__).parents[3] / "shared" / "wire"

MODEL: Final = "Qwen3-Reranker-4B"
QUERY: Final = "What is the capital of China?"
DOCUMENTS: Final = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other...",
    "pizza",
    "Rome is the capital of Italy",
]

CLASSES: Final[dict[int, type[APIStatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerError,
    413: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
    500: ServerError,
    502: ServerError,
    503: ServerError,
    504: ServerError,
}
"""The error that each status stands for."""

_REWRITTEN = {"connection", "content-encoding", "content-length", "date", "keep-alive", "server", "transfer-encoding"}
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Exchange:
    """One request and its reply; both bodies as they went over the wire."""

    name: str
    request: str
    reply: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: _JSON)
    path: str = "/v1/rerank"
    message: str = ""
    """What the reply gives as the reason of an error."""

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-litellm-call-id")

    @property
    def is_ranking(self) -> bool:
        if self.status != 200 or self.headers.get("x-litellm-attempted-fallbacks", "0") != "0":
            return False
        results = json.loads(self.reply).get("results")
        return bool(results) and None not in [result["relevance_score"] for result in results]


def recorded() -> Iterator[Exchange]:
    """Yield the recorded exchanges whose bodies are whole."""
    for file in sorted(RECORDINGS.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            exchange = json.loads(line)
            request, response = exchange["request"], exchange["response"]
            if request["method"] != "POST" or "...<clipped, " in request["body"] + response["body"]:
                continue
            yield Exchange(
                name=f"{file.stem}-{exchange['name']}",
                request=request["body"],
                reply=response["body"],
                status=response["status"],
                headers={name.lower(): value for name, value in response["headers"] if name.lower() not in _REWRITTEN},
                path=request["path"],
                message=json.loads(response["body"]).get("error", {}).get("message", ""),
            )


def _request(model: str = MODEL, query: str = QUERY, documents: list[str] = DOCUMENTS, **fields: Any) -> str:
    return json.dumps({"model": model, "query": query, "documents": documents, **fields})


def _error(message: str, code: str, kind: str = "None") -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": "None", "code": code}})


def _refusal(name: str, status: int, message: str, kind: str = "None", **fields: Any) -> Exchange:
    fields = {"request": _request()} | fields
    return Exchange(name, reply=_error(message, str(status), kind), status=status, message=message, **fields)


_ALL_RESULTS = """{"id":"score-bc6d523f8e7bf804","results":[
    {"index":0,"relevance_score":0.9170295000076294,"document":{"text":"The capital of China is Beijing."}},
    {"index":3,"relevance_score":0.8624928593635559,"document":{"text":"Rome is the capital of Italy"}},
    {"index":1,"relevance_score":0.8372812867164612,"document":{"text":"Gravity is a force that ..."}},
    {"index":2,"relevance_score":0.8217082023620605,"document":{"text":"pizza"}}],"meta":null}"""

OWN: Final = [
    Exchange(
        "all_results",
        request=_request(),
        headers=_JSON | {"x-litellm-call-id": "0b6f1c52-5c0f-4d0a-9f0e-3a1f6f0c7a11"},
        reply=_ALL_RESULTS,
    ),
    Exchange(
        "top_n",
        request=_request(top_n=2),
        reply="""{"id":"score-9d83b5c370eea382","results":[
            {"index":0,"relevance_score":0.9170295000076294,"document":"The capital of China is Beijing."},
            {"index":3,"relevance_score":0.8624928593635559,"document":null}],
            "meta":{"billed_units":{"total_tokens":299},"tokens":{"input_tokens":299}}}""",
    ),
    Exchange("top_n_over_n", request=_request(top_n=5, return_documents=False), reply=_ALL_RESULTS),
    Exchange(
        "blank_and_equal_documents",
        request=_request(documents=["pizza", " \n\t", "Rome", "", "pizza"]),
        reply="""{"id":"score-906dc950617e5f64","results":[
            {"index":1,"relevance_score":0.8881919384002686,"document":{"text":" \\n\\t"}},
            {"index":3,"relevance_score":0.8875486254692078,"document":{"text":""}},
            {"index":0,"relevance_score":0.8217082023620605,"document":{"text":"pizza"}},
            {"index":4,"relevance_score":0.8217082023620605,"document":{"text":"pizza"}},
            {"index":2,"relevance_score":0.6116502285003662,"document":{"text":"Rome"}}],"meta":null}""",
    ),
    Exchange(
        "unicode",
        request=_request(
            query="Qual è la capitale? 🇨🇳", documents=["北京是中国的首都", "👩‍👩‍👧‍👦 ẞ é", "e\u0301 \u2028 \ufeff \x00"]
        ),
        reply="""{"id":"score-9476176b87aba489","results":[
            {"index":2,"relevance_score":0.9801957011222839,"document":{"text":"e\u0301","multi_modal":null}},
            {"index":1,"relevance_score":0.9670321941375732,"document":{"text":"👩‍👩‍👧‍👦 ẞ é","multi_modal":null}},
            {"index":0,"relevance_score":0.0798560902476310,"document":{"text":"北京是中国的首都","multi_modal":null}}],
            "usage":{"prompt_tokens":54,"total_tokens":54}}""",
    ),
    _refusal(
        "wrong_key",
        401,
        "Authentication Error, Invalid proxy server token passed. Received API Key = sk-un...nown, Key Hash (Token) "
        "=6eace09f299b. Unable to find token in cache or `LiteLLM_VerificationTokenTable`",
        "token_not_found_in_db",
    ),
    _refusal(
        "model_not_allowed",
        403,
        "The requested model 'Qwen3-Reranker-4B' is not available for this API key, or the model name is invalid. "
        "Check the models available to you and try again.",
        "key_model_access_denied",
    ),
    _refusal(
        "unknown_model",
        400,
        "400: {'error': '/rerank: Invalid model name passed in model=no-such-model. Call `/v1/models` to view "
        "available models for your key.'}",
        request=_request(model="no-such-model"),
    ),
    _refusal(
        "budget_exceeded",
        422,
        "Budget has been exceeded! Current cost: 1.0, Max budget: 0.0",
        "budget_exceeded",
    ),
    _refusal(
        "limit_on_requests",
        429,
        "litellm.RateLimitError: Rate limit exceeded for api_key: bbf051b15326. Limit type: requests. Current limit: "
        "5, Remaining: 0. Limit resets at: 2026-11-23 01:22:42 UTC",
        "throttling_error",
        headers=_JSON | {"x-litellm-call-id": "1c7f2d63-6d1a-4e1b-8a1f-4b2a7a1d8b22"},
    ),
    _refusal(
        "limit_on_parallel_requests",
        429,
        "429: Rate limit exceeded for api_key: 57216798fd4f. Limit type: max_parallel_requests. Current limit: 2, "
        "Remaining: 0. Limit resets at: 2026-11-23 01:22:50 UTC",
    ),
    _refusal(
        "backend_timeout",
        408,
        "litellm.Timeout: Connection timed out. Timeout passed=3.0, time taken=3.001 seconds. Received Model "
        "Group=backend-slow\nAvailable Model Group Fallbacks=None",
        request=_request(model="backend-slow"),
    ),
    _refusal(
        "backend_down",
        500,
        "Cannot connect to host 127.0.0.1:18099 ssl:default [Connect call failed ('127.0.0.1', 18099)]. Received "
        "Model Group=backend-down\nAvailable Model Group Fallbacks=None",
        request=_request(model="backend-down"),
    ),
    _refusal(
        "context_length",
        400,
        '{"error":{"message":"This model\'s maximum context length is 4096 tokens. However, your prompt contains at '
        "least 4097 input tokens, which exceeds this limit even without any output tokens. Please reduce the length "
        'of the input prompt. (parameter=input_tokens, value=4097)","type":"BadRequestError","param":"input_tokens",'
        '"code":400}}. Received Model Group=Qwen3-Reranker-4B\nAvailable Model Group Fallbacks=None',
        request=_request(documents=["word " * 5_000, "pizza"]),
    ),
    Exchange(
        "error_in_a_200",
        request=_request(model="backend-200"),
        reply=_error("<html>not json</html>. Received Model Group=backend-200", "200"),
        headers=_JSON | {"x-litellm-call-id": "2d8a3e74-7e2b-4f2c-9b2a-5c3b8b2e9c33"},
        message="<html>not json</html>. Received Model Group=backend-200",
    ),
    Exchange(
        "answered_by_another_model",
        request=_request(),
        headers=_JSON | {"x-litellm-model-group": "other-reranker", "x-litellm-attempted-fallbacks": "1"},
        reply=_ALL_RESULTS,
        message="'Qwen3-Reranker-4B' was asked for, and 'other-reranker' has answered in its place",
    ),
    Exchange("null_in_a_200", request=_request(), reply='{"id":"x","results":null,"meta":null}'),
    Exchange("nothing_in_a_200", request=_request(), reply='{"id":"x","results":[],"meta":null}'),
    Exchange("detail_on_404", _request(), '{"detail":"Not Found"}', 404, path="/v2/rerank", message="Not Found"),
    Exchange(
        "html_on_502",
        request=_request(),
        reply="<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><hr><center>nginx</center></body></html>",
        status=502,
        headers={"content-type": "text/html"},
        message="502 Bad Gateway nginx",
    ),
]
"""One of each kind; these need no folder."""
