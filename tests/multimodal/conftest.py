"""Fixtures of the multimodal tests; made once a session, never written to."""

from pathlib import Path

import pytest

from openvision.multimodal.model.toy import write_toy_llm
from tests.multimodal import tiny


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory) -> Path:
    """A tiny Llama with a byte tokenizer."""
    return write_toy_llm(tmp_path_factory.mktemp("llm") / "llm")


@pytest.fixture(scope="session")
def model_folder(llm_folder, tmp_path_factory) -> Path:
    """A tiny LLaVA-1.5."""
    return tiny.write_model(llm_folder, tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="session")
def next_folder(llm_folder, tmp_path_factory) -> Path:
    """A tiny LLaVA-NeXT."""
    return tiny.write_model(llm_folder, tmp_path_factory.mktemp("next") / "model", "llava-next")


@pytest.fixture(scope="session")
def native_folder(llm_folder, tmp_path_factory) -> Path:
    """A tiny LLaVA-1.5 whose images keep their aspect."""
    return tiny.write_model(llm_folder, tmp_path_factory.mktemp("native") / "model", "llava-native")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Twelve conversations about images and one without."""
    return tiny.write_data(tmp_path_factory.mktemp("conversations") / "data")
