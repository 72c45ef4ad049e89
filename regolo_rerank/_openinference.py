"""Tracers: tokens for LangSmith, and attributes for OpenInference if the application has loaded its instrumentors."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

__all__ = ["show_inputs", "show_outputs", "show_report"]

_log = logging.getLogger("regolo_rerank")


def show_inputs(run: Any, query: str, documents: Sequence[Any], model: str, top_n: int | None) -> None:
    """Add the inputs of a LangChain run to its span."""
    top_k = len(documents) if top_n is None else top_n
    _show(run, {}, query=query, model_name=model, top_k=top_k, input_documents=_describe(documents))


def show_outputs(run: Any, documents: Sequence[Any], scores: list[float] | None, **report: Any) -> None:
    """Add the outputs of a LangChain run to its span.

    Add the tokens to the run itself, where LangChain's own models put them, so that LangSmith counts them.
    """
    _show(run, _attributes(report), output_documents=_describe(documents, scores))
    tokens = (report["usage"] or {}).get("total_tokens")
    if tokens is None:
        return
    with _logged_errors():
        for handler in run.handlers:
            traced = getattr(handler, "run_map", {}).get(str(run.run_id))
            if traced is not None:
                usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
                traced.extra.setdefault("metadata", {})["usage_metadata"] = usage


def _show(run: Any, further: dict[str, Any], **attributes: Any) -> None:
    """Add OpenInference's attributes of a reranker to the span of a LangChain run, if there is one."""
    if "openinference.instrumentation.langchain" not in sys.modules:
        return
    with _logged_errors():
        from langchain_core.tracers import BaseTracer
        from openinference.instrumentation import get_reranker_attributes
        from openinference.instrumentation.langchain import LangChainInstrumentor

        instrumentor = LangChainInstrumentor()
        if not instrumentor.is_instrumented_by_opentelemetry or (span := instrumentor.get_span(run.run_id)) is None:
            return
        for handler in run.handlers:
            # OpenInference derives a span's kind from the run's type. LangSmith has no type of this name, so for all
            # other handlers the run stays a chain.
            if isinstance(handler, BaseTracer) and hasattr(handler, "get_span"):
                handler.run_map[str(run.run_id)].run_type = "reranker"
        described = {**further, **get_reranker_attributes(**attributes)}
        # OpenTelemetry drops the first of too many attributes, which should be those of the last documents.
        span.set_attributes(dict(reversed(described.items())))


def _describe(documents: Sequence[Any], scores: list[float] | None = None) -> list[dict[str, Any]]:
    return [
        {"content": document.page_content, "id": document.id, "metadata": document.metadata or None, "score": score}
        for document, score in zip(documents, scores or repeat(None), strict=False)
    ]


def show_report(report: dict[str, Any]) -> None:
    """Add to LlamaIndex's span, if there is one, what OpenInference does not read from the events."""
    if "openinference.instrumentation.llama_index" not in sys.modules:
        return
    with _logged_errors():
        from openinference.instrumentation.llama_index import get_current_span

        if (span := get_current_span()) is not None:
            span.set_attributes(_attributes(report))


def _attributes(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report as attributes. Spans omit those that are None."""
    values = {name: report[name] for name in ("response_id", "request_ids", "fallback")} | (report["usage"] or {})
    return {f"regolo_rerank.{name}": value for name, value in values.items()}


@contextmanager
def _logged_errors() -> Iterator[None]:
    """Log the error of a tracer, so that it does not become an error of the call."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a tracer may raise anything
        _log.warning("A trace is incomplete: %s: %s", type(error).__name__, error)
