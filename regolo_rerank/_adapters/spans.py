"""What OpenInference's spans show of a rerank, where its instrumentors are at work: they are never loaded from here."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

__all__ = ["show_inputs", "show_outputs", "show_report"]

_log = logging.getLogger("regolo_rerank")


def show_inputs(run: Any, query: str, documents: Sequence[Any], model: str, top_n: int | None) -> None:
    """Show what a LangChain run begins with."""
    top_k = len(documents) if top_n is None else top_n
    _show(run, {}, query=query, model_name=model, top_k=top_k, input_documents=_describe(documents))


def show_outputs(run: Any, documents: Sequence[Any], scores: list[float] | None, **report: Any) -> None:
    """Show what a LangChain run has come to."""
    _show(run, _attributes(report), output_documents=_describe(documents, scores))


def _show(run: Any, further: dict[str, Any], **attributes: Any) -> None:
    """Show a run to OpenInference, where it listens, with the attributes that it has for a reranker."""
    if "openinference.instrumentation.langchain" not in sys.modules:
        return
    with _harmless():
        from langchain_core.tracers import BaseTracer
        from openinference.instrumentation import get_reranker_attributes
        from openinference.instrumentation.langchain import LangChainInstrumentor

        instrumentor = LangChainInstrumentor()
        if not instrumentor.is_instrumented_by_opentelemetry or (span := instrumentor.get_span(run.run_id)) is None:
            return
        for handler in run.handlers:
            # A span's kind is its run's type. For others the run stays a chain: LangSmith has no type of this name.
            if isinstance(handler, BaseTracer) and hasattr(handler, "get_span"):
                handler.run_map[str(run.run_id)].run_type = "reranker"
        told = {**further, **get_reranker_attributes(**attributes)}
        # Of too many attributes OpenTelemetry drops the first: these are to be the last documents.
        span.set_attributes(dict(reversed(told.items())))


def _describe(documents: Sequence[Any], scores: list[float] | None = None) -> list[dict[str, Any]]:
    return [
        {"content": document.page_content, "id": document.id, "metadata": document.metadata or None, "score": score}
        for document, score in zip(documents, scores or repeat(None), strict=False)
    ]


def show_report(report: dict[str, Any]) -> None:
    """Show on OpenInference's span, where there is one, what it does not take from the events."""
    if "openinference.instrumentation.llama_index" not in sys.modules:
        return
    with _harmless():
        from openinference.instrumentation.llama_index import get_current_span

        if (span := get_current_span()) is not None:
            span.set_attributes(_attributes(report))


def _attributes(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report as attributes of OpenInference's spans, which leave out what is None."""
    told = {name: report[name] for name in ("response_id", "request_ids", "fallback")} | (report["usage"] or {})
    return {f"regolo_rerank.{name}": value for name, value in told.items()}


@contextmanager
def _harmless() -> Iterator[None]:
    """Let no fault of somebody else's tracer become one of the rerank."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is
        _log.warning("regolo_rerank: a trace is incomplete: %s: %s", type(error).__name__, error)
