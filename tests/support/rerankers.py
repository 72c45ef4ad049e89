"""Local rerankers in the shape of those that the documentation shows, whose weights would have to be downloaded."""

import types
from typing import Any

import numpy as np


class CrossEncoder:
    """As sentence_transformers' class: it gives an array of one number a pair, the words that both texts share."""

    def __init__(self, model_name_or_path: str) -> None:
        assert "/" in model_name_or_path

    def predict(self, inputs: list[tuple[str, str]]) -> Any:
        return np.array([len(set(query.split()) & set(text.split())) for query, text in inputs], dtype=np.float32)


class RerankRequest:
    """As FlashRank's class."""

    def __init__(self, query: str, passages: list[dict[str, Any]]) -> None:
        self.query, self.passages = query, passages


class Ranker:
    """As FlashRank's class: it gives the passages themselves, the best first, each with a NumPy score."""

    def rerank(self, request: RerankRequest) -> list[dict[str, Any]]:
        pairs = [(request.query, passage["text"]) for passage in request.passages]
        for passage, score in zip(request.passages, CrossEncoder("a/b").predict(pairs), strict=True):
            passage["score"] = score
        request.passages.sort(key=lambda passage: passage["score"], reverse=True)
        return request.passages


MODULES = {
    "sentence_transformers": types.SimpleNamespace(CrossEncoder=CrossEncoder),
    "flashrank": types.SimpleNamespace(Ranker=Ranker, RerankRequest=RerankRequest),
}
