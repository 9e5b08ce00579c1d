"""Promise: on the models that people train, all branches are found, and skipped exactly.

A fixed sample of what `make coverage` runs in whole; its table is `docs/coverage.md`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from coverage import FILE, PAGE, measure
from coveragelib.explained import PLACES
from coveragelib.page import page
from coveragelib.subjects import Subject
from coveragelib.transformers_models import TYPES

pytestmark = pytest.mark.filterwarnings("default")  # those of other libraries' models

TIMM = {
    "cait cait": "cait_xxs24_224",
    "coat coat": "coat_lite_tiny",
    "convnext convnextv2": "convnextv2_atto",
    "edgenext edgenext": "edgenext_xx_small",  # with branches inside of branches
    "efficientnet efficientnet": "efficientnet_lite0",
    "maxxvit maxvit": "maxvit_pico_rw_256",
    "mobilenetv3 mobilenetv3": "mobilenetv3_small_050",
    "regnet regnetx": "regnetx_002",
    "xcit xcit": "xcit_nano_12_p8_224",
}
TRANSFORMERS = """
    bert roberta albert deberta bloom gpt2 gpt_neox gptj llama mistral qwen3 gemma t5 bart mixtral
    vit swin convnext wav2vec2 whisper clip mamba
"""
SUBJECTS = [
    *(Subject("timm", family, name) for family, name in TIMM.items()),
    Subject("torchvision", "regnet", "regnet_y_400mf"),
    Subject("torchvision", "detection.faster_rcnn", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    Subject("torchvision", "segmentation.lraspp", "lraspp_mobilenet_v3_large"),
    *(Subject("transformers", kind, kind, TYPES[kind]) for kind in TRANSFORMERS.split()),
]

# What reads the batch's size at one place in a layer and cuts it at another: "sample" is refused.
NO_ROWS = {"albert", "bloom", "xcit_nano_12_p8_224"}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: f"{s.library}:{s.name}")
def test_all_branches_are_found_and_skipped_exactly(subject: Subject) -> None:
    pytest.importorskip(subject.library)
    row = measure(subject)
    assert "error" not in row, row
    assert "refused" not in row, row
    assert row["agree"] or f"{subject.library}:{subject.family}" in PLACES, row
    for check in ("open_gates", "closed", "nothing_ran"):
        assert row[check] in ("yes", "rounding"), row
    assert row["fold"] == "yes" or row["fold"].startswith("no: "), row
    if subject.name in NO_ROWS:
        assert row["rows"].startswith("refused: "), row
        assert 'mode="sample"' in row["rows"], row
    else:
        assert row["rows"] in ("yes", "rounding"), row


@pytest.mark.parametrize("name", ["vgg11", "alexnet", "densenet121", "googlenet", "squeezenet1_1"])
def test_what_is_not_residual_has_no_place(name: str) -> None:
    pytest.importorskip("torchvision")
    row = measure(Subject("torchvision", name, name))
    assert "NoResidualBlocksError" in row.get("error", "") or row["found"] == row["expected"] == 0


def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def test_the_page_is_what_the_result_file_says() -> None:
    assert PAGE.read_text() == page(committed())


@pytest.mark.parametrize(("library", "least"), [("timm", 0.95), ("transformers", 0.9)])
def test_the_committed_run_met_its_target(library: str, least: float) -> None:
    rows = [row for row in committed()["results"][library].values() if "found" in row]
    assert sum(row["agree"] for row in rows) >= least * len(rows)
    assert sum("refused" in row for row in rows) <= 0.05 * len(rows)
    for family, row in committed()["results"][library].items():
        assert row.get("agree", True) or row["note"], f"{family} is not explained"


def test_sixty_types_of_transformers() -> None:
    assert len([row for row in committed()["results"]["transformers"].values() if row]) >= 60
