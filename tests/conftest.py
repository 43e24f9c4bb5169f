"""Fixtures of the whole suite."""

import json

import pytest
import torch
from helpers import TINY, built_once, write_data

torch.set_num_threads(1)  # the tests run in parallel processes that share the cores


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a tokenizer of 384 tokens, shards of some 60,000 tokens and a manifest. Not to be changed."""
    return built_once(tmp_path_factory, "data", write_data)


@pytest.fixture(scope="session")
def validation_texts(data):
    """The documents of the validation shards."""
    return json.loads((data / "validation.json").read_text())


@pytest.fixture(scope="session")
def tiny(data):
    """Settings of a run that takes seconds."""
    return dict(TINY, DATA_PATH=str(data))
