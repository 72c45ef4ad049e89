"""A process that a tracer watches: prints as JSON what the tracer and the server have seen of each call.

Tracers patch httpx for good, so each has a process of its own: `python -m tests.external.watched sentry`.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import httpx

from regolo_rerank import RegoloClient, RegoloError
from tests.support.stub import Received, Reply, Stub, error, pairs, scored

__all__ = ["CALLS", "CONNECTIONS", "DOCUMENTS", "RANKING", "TRACERS", "Observation", "Span", "rank"]

MODES: Final = ("sync", "async")
CONNECTIONS: Final = ("own", "callers")
"""Whose httpx client it is that sends."""

CALLS: Final = ("batched", "retried", "refused", "unreachable")

DOCUMENTS: Final = [f"{name} score=0.{place}" for place, name in enumerate("abcde", 1)]
"""Three requests of two documents at most."""
RANKING: Final = [(4, 0.5), (3, 0.4), (2, 0.3), (1, 0.2), (0, 0.1)]


def rank(
    mode: str, connections: str, base_url: str, documents: Sequence[str] = DOCUMENTS, **options: Any
) -> list[tuple[int, float]]:
    """Rank documents, two a request; the key is the environment's unless it is an option."""
    options = {"batch_size": 2, "base_url": base_url, **options}
    own = connections == "own"
    if mode == "sync":
        with ExitStack() as stack:
            http_client = None if own else stack.enter_context(httpx.Client())
            client = stack.enter_context(RegoloClient(http_client=http_client, **options))
            return pairs(client.rerank("q", documents).results)

    async def arank() -> list[tuple[int, float]]:
        async with AsyncExitStack() as stack:
            http_client = None if own else await stack.enter_async_context(httpx.AsyncClient())
            client = await stack.enter_async_context(RegoloClient(async_http_client=http_client, **options))
            return pairs((await client.arerank("q", documents)).results)

    return asyncio.run(arank())


@dataclass(frozen=True)
class Span:
    """What a tracer has recorded of one request; ids in hexadecimal."""

    trace: str
    parent: str
    id: str
    status: int | None


@dataclass(frozen=True)
class Observation:
    """What was seen of one call."""

    call: str
    mode: str
    connections: str
    caller: tuple[str, str]
    """Trace and span of the caller."""
    spans: list[Span]
    requests: list[dict[str, str]]
    """The headers of each request, as the server received them."""
    exported: str
    """All that the tracer has sent away."""


class Tracer(Protocol):
    """A tracer, which patches httpx as soon as it is made."""

    def calling(self) -> AbstractContextManager[tuple[str, str]]:
        """Give trace and span of a caller, and record the error of what he calls."""

    def spans(self) -> list[Span]:
        """Return the spans of requests since the last export."""

    def exported(self) -> str:
        """Return all that was recorded since the last export, as text."""


class Sentry:
    """Sentry with its default integrations and that of httpx, which it enables itself wherever httpx is installed."""

    def __init__(self) -> None:
        import sentry_sdk
        from sentry_sdk.envelope import Envelope
        from sentry_sdk.integrations.httpx import HttpxIntegration
        from sentry_sdk.transport import Transport

        self._envelopes: list[Envelope] = []
        kept = self._envelopes

        class Kept(Transport):
            def capture_envelope(self, envelope: Envelope) -> None:
                kept.append(envelope)

        sentry_sdk.init(
            dsn="https://public@sentry.invalid/1",
            transport=Kept,
            traces_sample_rate=1.0,
            trace_propagation_targets=["127.0.0.1"],
            auto_enabling_integrations=False,  # importing the frameworks takes a second
            integrations=[HttpxIntegration()],
        )

    @contextmanager
    def calling(self) -> Iterator[tuple[str, str]]:
        import sentry_sdk

        with sentry_sdk.isolation_scope(), sentry_sdk.start_transaction(name="caller") as transaction:
            try:
                yield transaction.trace_id, transaction.span_id
            except RegoloError as raised:
                sentry_sdk.capture_exception(raised)
            sentry_sdk.capture_message("done")  # takes the breadcrumbs with it

    def spans(self) -> list[Span]:
        transactions = [
            item.payload.json or {}
            for envelope in self._envelopes
            for item in envelope.items
            if item.type == "transaction"
        ]
        return [
            Span(
                span["trace_id"], span["parent_span_id"], span["span_id"], span["data"].get("http.response.status_code")
            )
            for transaction in transactions
            for span in transaction["spans"]
            if span["op"] == "http.client"
        ]

    def exported(self) -> str:
        text = "".join(envelope.serialize().decode() for envelope in self._envelopes)
        self._envelopes.clear()
        return text


class Datadog:
    """Datadog's tracer, whose traces end in a filter, so that no agent is asked for."""

    def __init__(self) -> None:
        import ddtrace
        from ddtrace.trace import Span as Recorded
        from ddtrace.trace import TraceFilter, tracer

        self._recorded: list[Recorded] = []
        kept = self._recorded

        class Kept(TraceFilter):
            def process_trace(self, trace: list[Recorded]) -> None:
                kept.extend(trace)

        tracer.configure(trace_processors=[Kept()])
        ddtrace.patch(httpx=True)

    @contextmanager
    def calling(self) -> Iterator[tuple[str, str]]:
        from ddtrace.trace import tracer

        with suppress(RegoloError), tracer.trace("caller") as span:
            yield f"{span.trace_id:032x}", f"{span.span_id:016x}"

    def spans(self) -> list[Span]:
        return [
            Span(
                f"{span.trace_id:032x}",
                f"{span.parent_id or 0:016x}",
                f"{span.span_id:016x}",
                int(status) if (status := span.get_tag("http.status_code")) else None,
            )
            for span in self._recorded
            if span.name == "http.request"
        ]

    def exported(self) -> str:
        text = "".join(f"{span!r} {span.get_tags()} {span.get_metrics()}" for span in self._recorded)
        self._recorded.clear()
        return text


class OpenTelemetry:
    """OpenTelemetry's instrumentor of httpx."""

    def __init__(self) -> None:
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter, self._provider = InMemorySpanExporter(), TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        HTTPXClientInstrumentor().instrument(tracer_provider=self._provider)

    @contextmanager
    def calling(self) -> Iterator[tuple[str, str]]:
        tracer = self._provider.get_tracer("caller")
        with suppress(RegoloError), tracer.start_as_current_span("caller") as span:
            context = span.get_span_context()
            yield f"{context.trace_id:032x}", f"{context.span_id:016x}"

    def spans(self) -> list[Span]:
        return [
            Span(
                f"{span.context.trace_id:032x}",
                f"{span.parent.span_id:016x}" if span.parent else "",
                f"{span.context.span_id:016x}",
                status if isinstance(status := (span.attributes or {}).get("http.response.status_code"), int) else None,
            )
            for span in self._exporter.get_finished_spans()
            if span.name == "POST"
        ]

    def exported(self) -> str:
        text = "".join(span.to_json() for span in self._exporter.get_finished_spans())
        self._exporter.clear()
        return text


TRACERS: Final[dict[str, Callable[[], Tracer]]] = {"sentry": Sentry, "datadog": Datadog, "opentelemetry": OpenTelemetry}


def quoting(request: Received) -> Reply:
    """Answer with an error that quotes the key."""
    return error(f"the header was {request.headers['authorization']}", 500)


def observed(tracer: Tracer) -> Iterator[Observation]:
    """Make each call in each mode over each connection, and yield what was seen of it."""
    with Stub() as closed:
        pass
    for mode in MODES:
        for connections in CONNECTIONS:
            for call in CALLS:
                with Stub(quoting if call == "refused" else scored) as stub:
                    if call == "retried":
                        stub.script(error("down", 500))
                    with tracer.calling() as caller:
                        rank(
                            mode,
                            connections,
                            closed.url if call == "unreachable" else stub.url,
                            DOCUMENTS if call == "batched" else DOCUMENTS[:1],
                            max_retries=1 if call == "retried" else 0,
                        )
                    yield Observation(
                        call,
                        mode,
                        connections,
                        caller,
                        tracer.spans(),
                        [request.headers for request in stub.received],  # no name for it: tracers record variables
                        tracer.exported(),
                    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(observation) for observation in observed(TRACERS[sys.argv[1]]())]))
