"""Marks and what many tests share. `-m "not slow"` leaves out tests that start processes, for a run within 90 seconds."""

import signal

import pytest

import currreft
from data import Processor
from runs import letters
from support.tiny import tiny_checkpoint, tiny_data


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts whole training runs as processes, with ranks and kills")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores, and so would runs


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """(checkpoint, data directory), for reading alone."""
    path = tmp_path_factory.mktemp("base")
    return tiny_checkpoint(path / "model"), tiny_data(path / "data")


@pytest.fixture(scope="session")
def processor(base):
    """The tokenizer and image processor of the checkpoint."""
    return Processor.from_pretrained(base[0])


@pytest.fixture
def learnable(monkeypatch):
    """Rewards that a random model can learn within a minute."""
    monkeypatch.setattr(currreft, "accuracy_reward", letters)
