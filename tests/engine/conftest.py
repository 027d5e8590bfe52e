"""Servers that the engine tests share, and the requests that they get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from live_server import Output, SabotagedServer, Server, StartServer, running
from models import make_tokenizer, write_tiny_llama
from ray_nodes import FakeNodes, Namespaces, Nodes, why_no_namespaces
from ray_servers import FLAGS as RAY_FLAGS
from ray_servers import SUBJECTS
from tokenizers import Regex, pre_tokenizers
from workloads import DEMO_FLAGS, LLM42_FLAGS, ONE_THREAD, VOCABULARY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts real servers."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the servers' logs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture
def start_server(logs: Path, request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """Starts a server for one test: ``start_server(model, *flags, **environment)``."""
    with ExitStack() as stack:

        def start(model: Path, *flags: str, **environment: str) -> Server:
            log = logs / f"{request.node.name}-{len(list(logs.iterdir()))}.log"
            return stack.enter_context(running(Server(model, log, (*LLM42_FLAGS, *flags), environment)))

        yield start


@pytest.fixture(scope="module")
def demo_server(smollm2: Path, logs: Path) -> Iterator[Server]:
    """The demo model, its processes started as SGLang starts them (see ``tests/quick_imports``)."""
    flags = (*DEMO_FLAGS, "--chunked-prefill-size", "256")
    with running(Server(smollm2, logs / "demo.log", flags, {"SPAWN": "1"})) as server:
        yield server


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in which a rounding difference soon becomes another token; id ``i`` is text ``wi``."""
    folder = tmp_path_factory.mktemp("random_llama")
    write_tiny_llama(folder, layers=4, hidden=256, intermediate=512, vocab=VOCABULARY, sensitive=True)
    make_tokenizer(["<s>", "</s>", *(f"w{i} " for i in range(2, VOCABULARY))]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spelling_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As :func:`random_llama`, with printable characters among its tokens, for grammars and stop strings."""
    folder = tmp_path_factory.mktemp("spelling_llama")
    write_tiny_llama(folder, layers=4, hidden=256, intermediate=512, vocab=VOCABULARY, sensitive=True)
    characters = [chr(code) for code in range(32, 127)]
    words = [f"w{i} " for i in range(VOCABULARY - 2 - len(characters))]
    tokenizer = make_tokenizer(["<s>", "</s>", *characters, *words])
    # Text is encoded character by character, so that it never has fewer tokens than SGLang expects.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sabotaged_server(random_llama: Path, logs: Path) -> Iterator[SabotagedServer]:
    """A server with the random Llama that can be broken in the ways of the test-only plugin."""
    flags = (*LLM42_FLAGS, "--max-total-tokens", "8192")
    server = SabotagedServer(random_llama, logs / "sabotaged.log", flags, ONE_THREAD)
    with running(server):
        yield server


@pytest.fixture(scope="session")
def expected(random_llama: Path, logs: Path) -> list[Output]:
    """Outputs of ``ray_servers.SUBJECTS``, one after the other, from the server without Ray."""
    with running(Server(random_llama, logs / "single.log", RAY_FLAGS, ONE_THREAD)) as server:
        outputs = [server.generate(request) for request in SUBJECTS]
    assert len({output.token_ids for output in outputs}) == len(SUBJECTS)
    return outputs


_Nodes = TypeVar("_Nodes", bound=Nodes)


@contextmanager
def _stopping(nodes: _Nodes) -> Iterator[_Nodes]:
    try:
        yield nodes
    finally:
        nodes.stop()


@pytest.fixture(scope="module")
def fake(logs: Path) -> Iterator[FakeNodes]:
    """Two nodes of Ray's fake cluster."""
    with _stopping(FakeNodes(logs)) as nodes:
        nodes.add()
        yield nodes


@pytest.fixture
def hosts(logs: Path) -> Iterator[Namespaces]:
    """Two hosts in network namespaces; the head has Ray's dashboard."""
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with _stopping(Namespaces(logs, dashboard=True)) as nodes:
        nodes.add()
        yield nodes


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Nodes:
    """Two hosts in network namespaces, or nodes of the fake cluster where they cannot be made."""
    return request.getfixturevalue("fake" if why_no_namespaces() else "hosts")
