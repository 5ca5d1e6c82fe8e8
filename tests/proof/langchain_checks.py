"""LangChain's standard tests of chat models, for langchain-openai's `ChatOpenAI` pointed at the demo.

`make test-langchain`. The properties say what the server offers; tests of what it does not offer are skipped by them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from support.live import live_server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo's API."""
    with live_server(tmp_path_factory.mktemp("langchain")) as server:
        yield server.url + "/v1"


class TestChat(ChatModelIntegrationTests):
    """The demo's `reverse` adapter as a chat model."""

    @pytest.fixture(autouse=True)
    def _server(self, url: str) -> None:
        self.url = url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """langchain-openai's client."""
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """A short answer of an adapter."""
        return {
            "model": "reverse", "base_url": self.url, "api_key": "none", "temperature": 0, "max_tokens": 32,
            "stream_usage": True,
        }  # fmt: skip

    @property
    def has_tool_calling(self) -> bool:
        """The demo's model knows no tools."""
        return False

    @property
    def has_structured_output(self) -> bool:
        """The standard tests of it call tools."""
        return False

    @property
    def supports_image_inputs(self) -> bool:
        """Text only."""
        return False

    @property
    def returns_usage_metadata(self) -> bool:
        """Whole and streamed."""
        return True


class TestEmbeddings(EmbeddingsIntegrationTests):
    """The demo's base as an embedding model."""

    @pytest.fixture(autouse=True)
    def _server(self, url: str) -> None:
        self.url = url

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        """langchain-openai's client."""
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        """Without `check_embedding_ctx_length` the client sends text, not the ids of OpenAI's own tokenizer."""
        return {
            "model": "loramux-demo", "base_url": self.url, "api_key": "none", "check_embedding_ctx_length": False,
        }  # fmt: skip
