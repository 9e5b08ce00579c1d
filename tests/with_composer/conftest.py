"""Tests beside MosaicML Composer: `make test-composer`. Elsewhere they are not even collected."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("composer") else ["test_*.py"]

# What Composer and its libraries say of themselves; every other warning is an error.
THIRD_PARTY = [
    "ignore:Some targets have less than 1 total probability",  # its loss, beside LabelSmoothing
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for line in THIRD_PARTY:
            item.add_marker(pytest.mark.filterwarnings(line))
