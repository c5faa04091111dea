"""Transformers' common model tests on a tiny model; `transformers_suite.py` runs this file with pytest, twice.

Environment: SUITE_ROOT is a checkout or source distribution of Transformers, SUITE_MODEL a name of
`tests/tiny_transformers.py`; with SUITE_ACCELERATE=1 every model is accelerated when `eval()` is called on it.
"""

from __future__ import annotations

import os
import sys
import unittest
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

import vitgraph
from vitgraph.errors import UnsupportedModuleError
from vitgraph.integrations.transformers.forward import AcceleratedForward

ROOT, NAME = Path(os.environ["SUITE_ROOT"]), os.environ["SUITE_MODEL"]
ACCELERATE = os.environ.get("SUITE_ACCELERATE") == "1"
CONFIG = vitgraph.EncoderConfig(max_tokens=64)
BATCH = 2
STUBS = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}
"""Parts of the suite that a source distribution leaves out, and what the rest needs of them."""


def load_mixin() -> type:
    """`ModelTesterMixin` of the checkout; parts that are missing there are left out."""
    sys.path.insert(0, str(ROOT))
    for name, mixin in STUBS.items():
        package = name.partition(".")[0]
        if not (ROOT / "tests" / package).exists():
            sys.modules[f"tests.{package}"] = ModuleType(f"tests.{package}")
            stub = sys.modules[f"tests.{name}"] = ModuleType(f"tests.{name}")
            setattr(stub, mixin, type(mixin, (), {}))
    return import_module("tests.test_modeling_common").ModelTesterMixin


def load_tiny() -> ModuleType:
    """This repository's tiny models; its `tests` folder is not the package of that name."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    assert find_spec("tiny_transformers"), "run this from a checkout of vitgraph"
    return import_module("tiny_transformers")


ModelTesterMixin, tiny = load_mixin(), load_tiny()


class Tester:
    """What the mixin asks about the model."""

    is_training = True
    batch_size = BATCH

    def __init__(self) -> None:
        self.prompt = tiny.prompt(NAME, tiny.IMAGES[:1])
        self.seq_length = self.prompt["input_ids"].shape[1]
        text = tiny.MODELS[NAME].text
        self.num_hidden_layers, self.hidden_size = text["num_hidden_layers"], text["hidden_size"]
        self.num_attention_heads = text["num_attention_heads"]
        vision = self.get_config().vision_config
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        width = getattr(vision, "embed_dim", vision.hidden_size)
        self.vision_config = self.video_config = {"num_hidden_layers": depth, "hidden_size": width}

    def get_config(self) -> Any:
        return tiny.MODELS[NAME].config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), {key: torch.cat([value] * BATCH) for key, value in self.prompt.items()}


class CommonTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (tiny.MODELS[NAME].classes()[1],)
    test_pruning = False

    def setUp(self) -> None:
        self.model_tester = Tester()


if ACCELERATE:
    plain_eval, plain_call = PreTrainedModel.eval, AcceleratedForward.__call__
    counts = {"calls": 0}

    def accelerated_eval(self: PreTrainedModel) -> PreTrainedModel:
        model = plain_eval(self)
        # A language model alone, or weights that are not there yet.
        with suppress(UnsupportedModuleError):
            vitgraph.accelerate(model, CONFIG, backend="native")
        return model

    def counted_call(self: AcceleratedForward, *args: Any, **kwargs: Any) -> Any:
        before = self.calls
        try:
            return plain_call(self, *args, **kwargs)
        finally:
            counts["calls"] += self.calls - before

    PreTrainedModel.eval, AcceleratedForward.__call__ = accelerated_eval, counted_call

    def teardown_module() -> None:
        print(f"\ncalls of the tower: {counts['calls']}")
