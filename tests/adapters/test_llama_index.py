"""The LlamaIndex adapter: nodes, engines, dumps and callbacks."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import TimeWeightedPostprocessor
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import ImageNode, IndexNode, MetadataMode, NodeWithScore, QueryBundle, TextNode

from regolo_rerank import AuthenticationError, InvalidInputError
from regolo_rerank.llama_index import RegoloRerank
from tests.adapters.helpers import BEST, QUERY, ids_of, nodes, scores_of, texts_of
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Reply, Stub, error, results


def index() -> VectorStoreIndex:
    """Return an index of the texts, all equally close to any query."""
    return VectorStoreIndex([candidate.node for candidate in nodes()], embed_model=MockEmbedding(embed_dim=2))


class Reranked(BaseRetriever):
    """A retriever that reranks inside."""

    def __init__(self, reranker: RegoloRerank) -> None:
        super().__init__()
        self.reranker = reranker

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.reranker.postprocess_nodes(nodes(), query_bundle)


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_node_keeps_its_class_and_fields(call: Call, llama_index: RegoloRerank, stub: Stub) -> None:
    """An image without text is not sent and ranks last."""
    llama_index.top_n, llama_index.score_metadata_key = None, None
    given = [
        ImageNode(image_url="http://localhost/x.png"),
        TextNode(text="a score=0.1", metadata={"source": "x"}, excluded_embed_metadata_keys=["source"]),
        IndexNode(text="b score=0.9", index_id="i-1"),
    ]
    kept = call(llama_index.postprocess_nodes, [NodeWithScore(node=node, score=0.25) for node in given], query_str="q")
    assert [candidate.node for candidate in kept] == [given[2], given[1], given[0]]
    assert [type(candidate.node) for candidate in kept] == [IndexNode, TextNode, ImageNode]
    assert scores_of(kept) == [0.9, 0.1, 0.0]
    assert stub.documents == [["a score=0.1", "b score=0.9"]]


@pytest.mark.parametrize(
    ("metadata_mode", "sent"),
    [
        (MetadataMode.ALL, "title: T\nid: 7\n\ntext"),
        (MetadataMode.EMBED, "title: T\n\ntext"),
        (MetadataMode.LLM, "id: 7\n\ntext"),
        (MetadataMode.NONE, "text"),
        (None, "title: T\n\ntext"),
    ],
)
def test_metadata_mode_selects_the_scored_metadata(
    call: Call, stub: Stub, metadata_mode: MetadataMode | None, sent: str
) -> None:
    """By default the reranker reads the text that was embedded."""
    options: dict[str, Any] = {} if metadata_mode is None else {"metadata_mode": metadata_mode}
    node = TextNode(
        text="text",
        metadata={"title": "T", "id": 7},
        excluded_embed_metadata_keys=["id"],
        excluded_llm_metadata_keys=["title"],
    )
    reranker = RegoloRerank(api_key=KEY, base_url=stub.url, prompt_format="plain", **options)
    call(reranker.postprocess_nodes, [NodeWithScore(node=node)], query_str="q")
    assert stub.documents == [[sent]]


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, {"relevance_score": 0.4}),
        ({"keep_retrieval_score": True}, {"relevance_score": 0.4, "retrieval_score": 0.25}),
        ({"keep_retrieval_score": True, "score_metadata_key": None}, {"retrieval_score": 0.25}),
        ({"score_metadata_key": None}, {}),
    ],
)
def test_added_metadata_is_hidden_from_models(
    call: Call, llama_index: RegoloRerank, options: dict[str, Any], added: dict[str, float]
) -> None:
    """The scores are in the metadata, and neither the LLM nor an embedding model reads them."""
    node = TextNode(
        text="text score=0.4",
        metadata={"title": "T"},
        excluded_embed_metadata_keys=["x"],
        excluded_llm_metadata_keys=["y"],
    )
    reranker = llama_index.with_options(**options)
    (kept,) = call(reranker.postprocess_nodes, [NodeWithScore(node=node, score=0.25)], query_str="q")
    assert (kept.score, kept.node.metadata) == (0.4, {"title": "T", **added})
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert kept.node.get_content(mode) == node.get_content(mode)
    assert kept.node.excluded_embed_metadata_keys == ["x", *added]
    assert kept.node.excluded_llm_metadata_keys == ["y", *added]


def test_a_second_rerank_replaces_the_first_score(call: Call, llama_index: RegoloRerank, stub: Stub) -> None:
    """The first score is not sent to the model, and its key is excluded once."""
    (kept,) = call(llama_index.postprocess_nodes, nodes()[1:2], query_str="q")
    (weighted,) = TimeWeightedPostprocessor(time_access_refresh=False).postprocess_nodes([kept])
    assert (weighted.score, weighted.node.metadata) == (1.9, {"relevance_score": 0.9})
    stub.script(Reply(results((0, 0.2))))
    (again,) = call(llama_index.postprocess_nodes, [weighted], query_str="q")
    assert (again.score, again.node.metadata) == (0.2, {"relevance_score": 0.2})
    assert stub.documents == [["b score=0.9"]] * 2
    assert again.node.excluded_llm_metadata_keys == ["relevance_score"]


def test_a_missing_query_is_rejected(call: Call, llama_index: RegoloRerank, stub: Stub) -> None:
    """The error explains how to pass one, also for a text in place of a query bundle."""
    with pytest.raises(InvalidInputError, match=r"query: missing. Pass query_str=\.\.\."):
        call(llama_index.postprocess_nodes, nodes())
    wrong: Any = "q"
    with pytest.raises(InvalidInputError, match=r"must be a QueryBundle, got str\. Pass a text as query_str"):
        call(llama_index.postprocess_nodes, nodes(), wrong)
    assert stub.received == []


# --- engines and retrievers -------------------------------------------------------------------------------------------


def test_a_query_engine_reranks(call: Call, llama_index: RegoloRerank, stub: Stub) -> None:
    """The answer rests on the best nodes, in their order, and the LLM reads no others."""
    engine: Any = index().as_query_engine(llm=MockLLM(), node_postprocessors=[llama_index], similarity_top_k=3)
    response = call(engine.query, QUERY)
    assert (texts_of(response.source_nodes), scores_of(response.source_nodes)) == (BEST, [0.9, 0.5])
    assert "b score=0.9\n\nc score=0.5" in str(response)
    assert "a score=0.1" not in str(response)
    assert stub.received[0].json["query"] == QUERY


def test_a_fusion_retriever_fuses_reranked_nodes(llama_index: RegoloRerank) -> None:
    """It recognises a node by its hash, which a score of each query in the metadata would change."""
    llama_index.score_metadata_key, llama_index.top_n = None, None
    fusion = QueryFusionRetriever(
        [Reranked(llama_index), Reranked(llama_index)],
        llm=MockLLM(),
        num_queries=1,
        mode=FUSION_MODES.RECIPROCAL_RANK,
        similarity_top_k=3,
        use_async=False,
    )
    fused = fusion.retrieve(QUERY)
    assert ids_of(fused) == ["1", "2", "0"]
    assert fused[0].score == pytest.approx(2 / 60)


@pytest.mark.anyio
async def test_nested_async_calls_work(llama_index: RegoloRerank) -> None:
    """A sync engine inside a running loop and several async engines at once all rerank."""
    engine: Any = index().as_query_engine(llm=MockLLM(), node_postprocessors=[llama_index], similarity_top_k=3)
    responses = await asyncio.gather(*(engine.aquery(QUERY) for _ in range(3)))
    assert [texts_of(response.source_nodes) for response in (*responses, engine.query(QUERY))] == [BEST] * 4


# --- dumps ------------------------------------------------------------------------------------------------------------

DUMPS: dict[str, tuple[Callable[[RegoloRerank], Any], Callable[[Any], RegoloRerank]]] = {
    "dict": (RegoloRerank.to_dict, RegoloRerank.from_dict),
    "json": (RegoloRerank.to_json, RegoloRerank.from_json),
    "model_dump": (RegoloRerank.model_dump, RegoloRerank.model_validate),
    "model_dump_json": (RegoloRerank.model_dump_json, RegoloRerank.model_validate_json),
}


@pytest.mark.parametrize("form", DUMPS)
def test_a_dump_keeps_the_options_and_no_key(
    call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The loaded reranker has the same options and takes its key from the environment. The original still works."""
    dump, load = DUMPS[form]
    handler = LlamaDebugHandler(print_trace_on_end=False)
    with httpx.Client(headers={"x-caller": "mine"}) as http_client:
        reranker = RegoloRerank(
            api_key=KEY,
            base_url=stub.url,
            model="m",
            top_n=2,
            metadata_mode=MetadataMode.LLM,
            keep_retrieval_score=True,
            extra_body={"user": "u"},
            http_client=http_client,
            callback_manager=CallbackManager([handler]),
        )
        dumped = dump(reranker)
        assert KEY not in str(dumped)
        loaded = load(dumped)
        assert loaded.model_dump() == reranker.model_dump()
        assert (loaded.api_key, loaded.http_client, loaded.callback_manager.handlers) == (None, None, [])
        reranker.postprocess_nodes(nodes(), query_str="q")
    assert len(handler.get_event_pairs(CBEventType.RERANKING)) == 1
    monkeypatch.setenv("REGOLO_API_KEY", "sk-environment")
    assert texts_of(call(loaded.postprocess_nodes, nodes(), query_str="q")) == BEST
    sent = [(request.headers.get("x-caller"), request.headers["authorization"]) for request in stub.received]
    assert sent == [("mine", f"Bearer {KEY}"), (None, "Bearer sk-environment")]


def test_a_dump_names_its_class(llama_index: RegoloRerank) -> None:
    """LlamaIndex finds the class of a dump by the name in it, and the constructor ignores that name."""
    assert llama_index.to_dict()["class_name"] == RegoloRerank.class_name() == "RegoloRerank"
    options: dict[str, Any] = {"class_name": "RegoloRerank", "top_n": 3}
    assert [RegoloRerank(**options).top_n, RegoloRerank.from_dict(options).top_n] == [3, 3]
    with pytest.raises(InvalidInputError, match="clas_name: unknown option"):
        RegoloRerank.from_dict({"clas_name": "RegoloRerank"})


def test_callbacks_show_input_result_and_error(call: Call, llama_index: RegoloRerank, stub: Stub) -> None:
    """A callback manager that is assigned later sees nodes, model, query and top_k, and the nodes that were kept."""
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([handler])
    given = nodes()
    kept = call(llama_index.postprocess_nodes, given, query_str=QUERY)
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError) as raised:
        call(llama_index.postprocess_nodes, given, query_str=QUERY)
    (start, end), (_, failed) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: given,
        EventPayload.MODEL_NAME: "Qwen3-Reranker-4B",
        EventPayload.QUERY_STR: QUERY,
        EventPayload.TOP_K: 2,
    }
    assert end.payload is not None
    assert end.payload[EventPayload.NODES] == kept
    assert failed.payload == {EventPayload.EXCEPTION: raised.value}
