import asyncio
import pickle
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import httpx
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import TimeWeightedPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, ImageNode, IndexNode, MetadataMode, NodeWithScore, TextNode
from pydantic import ValidationError

from regolo_rerank import AuthenticationError, InvalidInputError
from regolo_rerank.llama_index import RegoloRerank
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Reply, Stub, error, results


@pytest.fixture
def reranker(stub: Stub) -> RegoloRerank:
    """A reranker that sends texts as they are and does not retry."""
    return RegoloRerank(KEY, base_url=stub.url, prompt_format="plain", max_retries=0)


def candidates() -> list[NodeWithScore]:
    """Return nodes whose best one is the second and whose worst one is the first."""
    return [
        NodeWithScore(node=TextNode(text=text, id_=text[0]), score=0.25)
        for text in ("a score=0.1", "b score=0.9", "c score=0.5")
    ]


def unscored(ranked: NodeWithScore) -> BaseNode:
    """Return a node as it was before reranking added its score."""
    hidden = {
        name: [key for key in getattr(ranked.node, name) if key != "relevance_score"]
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    metadata = {key: value for key, value in ranked.node.metadata.items() if key != "relevance_score"}
    return ranked.node.model_copy(update={"metadata": metadata, **hidden})


def pairs(nodes: Iterable[NodeWithScore]) -> list[tuple[str, float | None]]:
    """Return the nodes' ids and scores."""
    return [(node.node_id, node.score) for node in nodes]


def index() -> VectorStoreIndex:
    """Return an index of the candidates, all equally close to any query."""
    return VectorStoreIndex([candidate.node for candidate in candidates()], embed_model=MockEmbedding(embed_dim=2))


def test_the_best_nodes_come_first_with_their_scores(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """The `top_n` best nodes come back in order, `score` set; all of them were sent."""
    reranker.top_n = 2
    assert pairs(call(reranker.postprocess_nodes, candidates(), query_str="q")) == [("b", 0.9), ("c", 0.5)]
    assert stub.documents == [["a score=0.1", "b score=0.9", "c score=0.5"]]


@pytest.mark.parametrize("keep_retrieval_score", [False, True])
def test_the_callers_nodes_are_never_changed(call: Call, reranker: RegoloRerank, keep_retrieval_score: bool) -> None:
    """Nodes, scores and metadata are after the call what they were before, and none is handed out itself."""
    reranker.keep_retrieval_score = keep_retrieval_score
    given = [NodeWithScore(node=TextNode(text="d", metadata={"nested": {"tags": ["y"]}}), score=0.5), *candidates()]
    before = deepcopy(given)
    ranked = call(reranker.postprocess_nodes, given, query_str="q")
    assert given == before
    own, handed_out = (
        {id(part) for candidate in nodes for part in (candidate, candidate.node, candidate.node.metadata)}
        for nodes in (given, ranked)
    )
    assert not own & handed_out


def test_every_kind_of_node_is_reranked(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Each comes back in its own class with all its fields; an image without text is not sent and ranks last."""
    nodes = [
        ImageNode(image_url="http://localhost/x.png"),
        TextNode(text="a score=0.1", metadata={"source": "x"}, excluded_embed_metadata_keys=["source"]),
        IndexNode(text="b score=0.9", index_id="i-1"),
    ]
    ranked = call(reranker.postprocess_nodes, [NodeWithScore(node=node, score=0.25) for node in nodes], query_str="q")
    assert [type(candidate.node) for candidate in ranked] == [IndexNode, TextNode, ImageNode]
    assert list(map(unscored, ranked)) == [nodes[2], nodes[1], nodes[0]]
    assert [candidate.score for candidate in ranked] == [0.9, 0.1, 0.0]
    assert stub.documents == [["a score=0.1", "b score=0.9"]]


@pytest.mark.parametrize(
    ("mode_of_metadata", "sent"),
    [
        (MetadataMode.ALL, "title: T\nid: 7\n\ntext"),
        (MetadataMode.EMBED, "title: T\n\ntext"),
        (MetadataMode.LLM, "id: 7\n\ntext"),
        (MetadataMode.NONE, "text"),
    ],
)
def test_metadata_mode_says_what_is_scored(
    call: Call, reranker: RegoloRerank, stub: Stub, mode_of_metadata: MetadataMode, sent: str
) -> None:
    """A node's text goes out with the metadata that the mode shows."""
    reranker.metadata_mode = mode_of_metadata
    node = TextNode(
        text="text",
        metadata={"title": "T", "id": 7},
        excluded_embed_metadata_keys=["id"],
        excluded_llm_metadata_keys=["title"],
    )
    call(reranker.postprocess_nodes, [NodeWithScore(node=node)], query_str="q")
    assert stub.documents == [[sent]]


def test_metadata_is_scored_as_it_is_embedded_by_default(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Without an option, the reranker reads what the retriever's embeddings were made of."""
    node = TextNode(text="text", metadata={"title": "T", "id": 7}, excluded_embed_metadata_keys=["id"])
    call(reranker.postprocess_nodes, [NodeWithScore(node=node)], query_str="q")
    assert stub.documents == [[node.get_content(MetadataMode.EMBED)]]


@pytest.mark.parametrize("keep_retrieval_score", [False, True])
def test_scores_are_kept_out_of_sight(call: Call, reranker: RegoloRerank, keep_retrieval_score: bool) -> None:
    """They are in the metadata, the retriever's on demand, and neither the LLM nor an embedding model sees them."""
    reranker.keep_retrieval_score = keep_retrieval_score
    node = TextNode(
        text="text score=0.4",
        metadata={"title": "T"},
        excluded_embed_metadata_keys=["x"],
        excluded_llm_metadata_keys=["y"],
    )
    (kept,) = call(reranker.postprocess_nodes, [NodeWithScore(node=node, score=0.25)], query_str="q")
    scores = {"retrieval_score": 0.25} if keep_retrieval_score else {}
    scores["relevance_score"] = 0.4
    assert (kept.score, kept.node.metadata) == (0.4, {"title": "T", **scores})
    for mode_of_metadata in (MetadataMode.LLM, MetadataMode.EMBED):
        assert kept.node.get_content(mode_of_metadata) == node.get_content(mode_of_metadata)
    assert kept.node.excluded_embed_metadata_keys == ["x", *scores]
    assert kept.node.excluded_llm_metadata_keys == ["y", *scores]


def test_the_relevance_score_outlives_the_next_postprocessor(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """What reranks again, or sets scores of its own, leaves the metadata; a second rerank has its own, listed once."""
    (kept,) = call(reranker.postprocess_nodes, candidates()[1:2], query_str="q")
    (weighted,) = TimeWeightedPostprocessor(time_access_refresh=False).postprocess_nodes([kept])
    assert (weighted.score, weighted.node.metadata) == (1.9, {"relevance_score": 0.9})
    stub.script(Reply(results((0, 0.2))))
    (again,) = call(reranker.postprocess_nodes, [weighted], query_str="q")
    assert (again.score, again.node.metadata) == (0.2, {"relevance_score": 0.2})
    assert stub.documents == [["b score=0.9"]] * 2
    assert again.node.excluded_llm_metadata_keys.count("relevance_score") == 1


def test_a_missing_query_is_refused(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """The error has the words of LlamaIndex's own rerankers, and is a ValueError as theirs is."""
    with pytest.raises(InvalidInputError, match=r"^Missing query bundle in extra info\. Pass query_str, or") as refused:
        call(reranker.postprocess_nodes, candidates(), query_str=None)
    assert isinstance(refused.value, ValueError)
    assert stub.received == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([candidates()[0], TextNode(text="b")], r"nodes\[1\]: must be NodeWithScore, got TextNode"),
        (["b"], r"nodes\[0\]: must be NodeWithScore, got str; pass NodeWithScore\(node=TextNode\(text=...\)\), or"),
        ("text", r"nodes: must be a list of NodeWithScore, got str"),
    ],
)
def test_what_is_no_node_with_score_is_refused(
    call: Call, reranker: RegoloRerank, stub: Stub, given: Any, problem: str
) -> None:
    """The error names the place and the type, and nothing is sent."""
    with pytest.raises(InvalidInputError, match=problem):
        call(reranker.postprocess_nodes, given, query_str="q")
    assert stub.received == []


def test_a_query_engine_reranks(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """The answer rests on the best nodes, in their order, and the LLM sees no others."""
    reranker.top_n = 2
    engine = index().as_query_engine(llm=MockLLM(), node_postprocessors=[reranker], similarity_top_k=3)
    assert isinstance(engine, RetrieverQueryEngine)
    response: Any = call(engine.query, "capital")
    assert pairs(response.source_nodes) == [("b", 0.9), ("c", 0.5)]
    assert "b score=0.9\n\nc score=0.5" in str(response)
    assert "a score=0.1" not in str(response)
    assert stub.received[0].json["query"] == "capital"


@pytest.mark.parametrize("chat_mode", [ChatMode.CONTEXT, ChatMode.CONDENSE_PLUS_CONTEXT])
def test_a_chat_engine_reranks(call: Call, reranker: RegoloRerank, chat_mode: ChatMode) -> None:
    """A chat's context holds the best nodes, in their order, and no others."""
    reranker.top_n = 2
    engine = index().as_chat_engine(
        chat_mode=chat_mode,
        llm=MockLLM(),
        memory=ChatMemoryBuffer.from_defaults(token_limit=3_000),
        node_postprocessors=[reranker],
        similarity_top_k=3,
    )
    response = call(engine.chat, "capital")
    assert pairs(response.source_nodes) == [("b", 0.9), ("c", 0.5)]
    assert "b score=0.9\n\nc score=0.5" in str(response)
    assert "a score=0.1" not in str(response)


def by_length(_query: str, documents: list[str]) -> list[float]:
    """Score by length, as a scorer that can be pickled."""
    return [float(len(document)) for document in documents]


Dump = Callable[[RegoloRerank], Any]
Load = Callable[[Any], RegoloRerank]

WAYS = pytest.mark.parametrize(
    ("dump", "load"),
    [
        pytest.param(RegoloRerank.to_dict, RegoloRerank.from_dict, id="dict"),
        pytest.param(RegoloRerank.to_json, RegoloRerank.from_json, id="json"),
        pytest.param(RegoloRerank.model_dump, RegoloRerank.model_validate, id="model_dump"),
        pytest.param(RegoloRerank.model_dump_json, RegoloRerank.model_validate_json, id="model_dump_json"),
        pytest.param(pickle.dumps, pickle.loads, id="pickle"),
    ],
)


@WAYS
def test_a_dump_keeps_the_options_and_no_key(
    call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch, dump: Dump, load: Load
) -> None:
    """What comes back has the same options, and takes its key from the environment."""
    reranker = RegoloRerank(
        KEY,
        base_url=stub.url,
        model="m",
        top_n=2,
        metadata_mode=MetadataMode.LLM,
        keep_retrieval_score=True,
        extra_body={"user": "u"},
    )
    dumped = dump(reranker)
    assert KEY not in str(dumped)
    loaded = load(dumped)
    assert loaded.api_key is None
    assert loaded.model_dump() == reranker.model_dump()
    monkeypatch.setenv("REGOLO_API_KEY", "sk-environment")
    assert pairs(call(loaded.postprocess_nodes, candidates(), query_str="q")) == [("b", 0.9), ("c", 0.5)]
    assert stub.received[0].headers["authorization"] == "Bearer sk-environment"


@WAYS
def test_a_dump_leaves_the_original_as_it_was(stub: Stub, dump: Dump, load: Load) -> None:
    """Its key, http clients and callbacks are still there and work, and the loaded one has none of them."""
    handler = LlamaDebugHandler(print_trace_on_end=False)
    with httpx.Client(headers={"x-caller": "sync"}) as http_client:
        async_http_client = httpx.AsyncClient(headers={"x-caller": "async"})
        callback_manager = CallbackManager([handler])
        reranker = RegoloRerank(
            KEY,
            base_url=stub.url,
            http_client=http_client,
            async_http_client=async_http_client,
            callback_manager=callback_manager,
        )
        loaded = load(dump(reranker))
        assert (loaded.http_client, loaded.async_http_client, loaded.callback_manager.handlers) == (None, None, [])
        assert reranker.http_client is http_client
        assert reranker.async_http_client is async_http_client
        assert reranker.callback_manager is callback_manager

        async def later() -> None:
            async with async_http_client:
                await reranker.apostprocess_nodes(candidates(), query_str="q")

        reranker.postprocess_nodes(candidates(), query_str="q")
        asyncio.run(later())
    assert [request.headers["x-caller"] for request in stub.received] == ["sync", "async"]
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert len(handler.get_event_pairs(CBEventType.RERANKING)) == 2


@WAYS
def test_a_dump_leaves_a_scorer_where_it_is(call: Call, dump: Dump, load: Load) -> None:
    """A scorer is still used after a dump; only a pickle takes it along."""
    reranker = RegoloRerank(base_url="local://", scorer=by_length)
    loaded = load(dump(reranker))
    assert loaded.scorer is (by_length if dump is pickle.dumps else None)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("aa", "aaaa", "a")]
    assert [candidate.score for candidate in call(reranker.postprocess_nodes, nodes, query_str="q")] == [4.0, 2.0, 1.0]


def test_a_deep_copy_is_complete_and_apart(call: Call, stub: Stub) -> None:
    """It has the key and the callers' http clients, and shares no option that can be changed."""
    with httpx.Client(headers={"x-caller": "sync"}) as http_client:
        handler = LlamaDebugHandler(print_trace_on_end=False)
        reranker = RegoloRerank(
            KEY,
            base_url=stub.url,
            http_client=http_client,
            callback_manager=CallbackManager([handler]),
            extra_body={"tags": ["x"]},
        )
        copied = deepcopy(reranker)
        assert (copied.http_client, copied.callback_manager) == (http_client, reranker.callback_manager)
        assert copied.extra_body is not None
        copied.extra_body["tags"].append("y")
        copied.top_n = 1
        assert len(call(copied.postprocess_nodes, candidates(), query_str="q")) == 1
        assert len(call(reranker.postprocess_nodes, candidates(), query_str="q")) == 3
    assert [request.json["tags"] for request in stub.received] == [["x", "y"], ["x"]]
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert len(handler.get_event_pairs(CBEventType.RERANKING)) == 2


@pytest.mark.parametrize(
    "make",
    [RegoloRerank.from_dict, RegoloRerank.model_validate, lambda options: RegoloRerank(**options)],
    ids=["from_dict", "model_validate", "constructor"],
)
def test_llama_indexs_class_name_is_no_option(make: Callable[[dict[str, Any]], RegoloRerank]) -> None:
    """The key that LlamaIndex adds to a dump is accepted and dropped."""
    assert make({"class_name": "RegoloRerank", "top_n": 2}).top_n == 2


def test_a_dump_names_its_class(reranker: RegoloRerank) -> None:
    """LlamaIndex finds the class of a dump by the name in it."""
    assert reranker.to_dict()["class_name"] == RegoloRerank.class_name() == "RegoloRerank"


@pytest.mark.parametrize(
    "make",
    [RegoloRerank.from_dict, lambda options: RegoloRerank(**options)],
    ids=["from_dict", "constructor"],
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("clas_name", "RegoloRerank"), ("metadata_mode", "vector"), ("keep_retrieval_score", "often"), ("topn", 3)],
)
def test_a_mistyped_option_is_refused_by_name(
    make: Callable[[dict[str, Any]], RegoloRerank], name: str, value: Any
) -> None:
    """A key that is no option, or a value that an option cannot have, is an error that names it."""
    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        make({"class_name": "RegoloRerank", name: value})


def test_callbacks_tell_what_was_asked_and_kept(call: Call, reranker: RegoloRerank) -> None:
    """A callback manager that is assigned later is told of nodes, model, query and top_k, and of what was kept."""
    handler = LlamaDebugHandler(print_trace_on_end=False)
    reranker.callback_manager = CallbackManager([handler])
    reranker.top_n = 2
    given = candidates()
    kept = call(reranker.postprocess_nodes, given, query_str="capital")
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: given,
        EventPayload.MODEL_NAME: "Qwen3-Reranker-4B",
        EventPayload.QUERY_STR: "capital",
        EventPayload.TOP_K: 2,
    }
    assert end.payload is not None
    assert end.payload[EventPayload.NODES] == kept


def test_callbacks_are_told_the_end_of_a_failed_call(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """An error ends the event, which holds it."""
    handler = LlamaDebugHandler(print_trace_on_end=False)
    reranker.callback_manager = CallbackManager([handler])
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError) as refused:
        call(reranker.postprocess_nodes, candidates(), query_str="q")
    ((_, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert end.payload == {EventPayload.EXCEPTION: refused.value}


def test_a_text_in_place_of_a_query_bundle_is_refused(call: Call) -> None:
    """The error says where a text belongs."""
    reranker, nodes = RegoloRerank(base_url="local://"), [NodeWithScore(node=TextNode(text="a"))]
    wrong: Any = "q"
    with pytest.raises(InvalidInputError, match="must be a QueryBundle, got str; pass a text as query_str"):
        call(reranker.postprocess_nodes, nodes, wrong)
