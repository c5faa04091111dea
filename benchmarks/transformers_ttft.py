"""Time to the first token of a Transformers model before and after `vitgraph.accelerate`, and the tower's share of it.

    python benchmarks/transformers_ttft.py [--models 2b 8b] [--runs 30] [--json FILE]
    python benchmarks/transformers_ttft.py --tiny        # a tiny model, also on the CPU: shows that it runs, no more

Qwen3-VL with random weights, language model and tower at their published sizes, in bfloat16. Prompts: one image of
448 x 448 px with 32 tokens of text, four of them, and a clip of 16 such frames. Pixels and grids lie on the device, as
the output of a processor does after `.to(device)`. Medians in milliseconds, each call between two synchronisations,
before and after in three turns:

- `first token`: `generate(max_new_tokens=1)` on the whole prompt;
- `tower`: the tower alone, on the same pixels;
- `language model`: `generate(max_new_tokens=1)` on a prompt of text alone with as many tokens;
- `peak`: most device memory allocated during the calls for the first token, weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vitgraph
from vitgraph.bench.geometries import geometry
from vitgraph.bench.report import environment

WARMUP, ROUNDS = 3, 3
TEXT_TOKENS = 32
ROPE = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
SHARED = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "rope_parameters": ROPE}
TEXT = {
    "2b": SHARED | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8b": SHARED
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]},
    },
}
TIED = {"2b": True, "8b": False, "tiny": True}
TINY_VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_heads": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
SPECIAL = 4
"""Ids that are no text: image, video, start, end; the last of the vocabulary."""


@dataclass(frozen=True)
class Workload:
    """Pictures of one prompt: `images` of t = 1, or one clip of `frames` temporal patches; sides in patches."""

    name: str
    images: int
    frames: int
    side: int

    @property
    def grids(self) -> list[list[int]]:
        return [[self.frames, self.side, self.side]] * self.images

    @property
    def runs(self) -> int:
        """Runs of placeholders: one per image, one per temporal patch of a clip."""
        return self.images * self.frames

    @property
    def tokens_per_run(self) -> int:
        return (self.side // 2) ** 2


FULL = (Workload("1 image", 1, 1, 28), Workload("4 images", 4, 1, 28), Workload("16 frames", 1, 8, 28))
SMALL = (Workload("1 image", 1, 1, 6), Workload("4 images", 4, 1, 6), Workload("16 frames", 1, 8, 4))


@dataclass(frozen=True)
class Row:
    """One model and workload; times in milliseconds, memory in bytes (0 on the CPU)."""

    model: str
    workload: str
    prompt_tokens: int
    first_token_before: float
    first_token_after: float
    tower_before: float
    tower_after: float
    language_model: float
    peak_before: int
    peak_after: int
    same_token: bool
    fallbacks: dict[str, int]


def make_model(size: str, device: torch.device) -> Any:
    """Qwen3-VL at a published size, or tiny, with random weights."""
    text = TEXT[size] | {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    vision = dict(TINY_VISION if size == "tiny" else geometry(f"qwen3-vl-{size}")["vision_config"])
    vision.pop("model_type", None)
    first = text["vocab_size"] - SPECIAL
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: first + number for number, name in enumerate(names)}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=TIED[size], **ids)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype).eval()


def make_prompt(model: Any, workload: Workload) -> dict[str, Tensor]:
    """Arguments of `generate`: text, then a run of placeholders per image or temporal patch."""
    config, kind = model.config, "image" if workload.frames == 1 else "video"
    token = getattr(config, f"{kind}_token_id")
    ids = [7] * TEXT_TOKENS
    for _ in range(workload.runs):
        ids += [config.vision_start_token_id, *[token] * workload.tokens_per_run, config.vision_end_token_id]
    input_ids = torch.tensor([ids], device=model.device)
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rows = workload.runs * workload.side**2
    pixels = torch.randn(rows, width, device=model.device, dtype=model.dtype)
    grids = torch.tensor(workload.grids, device=model.device)
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == token).int() * (1 if kind == "image" else 2),
        **dict(zip(names, (pixels, grids), strict=True)),
    }


def text_alone(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt of text with as many tokens."""
    return {"input_ids": torch.full_like(prompt["input_ids"], 7), "attention_mask": prompt["attention_mask"]}


def times_of(call: Callable[[], object], runs: int) -> list[float]:
    """Wall clocks of a call and its work on the device, milliseconds, after a few that are not timed."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for run in range(WARMUP + runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if run >= WARMUP:
            times.append((time.perf_counter() - start) * 1e3)
    return times


@dataclass
class Measured:
    """What one state of the model showed: milliseconds, peak bytes, and the token."""

    first_token: list[float] = field(default_factory=list)
    tower: list[float] = field(default_factory=list)
    peak: int = 0
    token: int = -1

    def add(self, model: Any, prompt: dict[str, Tensor], runs: int) -> None:
        """Runs more."""
        pixels = next(v for k, v in prompt.items() if k.startswith("pixel_values"))
        grids = next(v for k, v in prompt.items() if k.endswith("grid_thw"))
        settings = {"max_new_tokens": 1, "do_sample": False}
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.first_token += times_of(lambda: model.generate(**prompt, **settings), runs)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() if on_gpu else 0)
        with torch.no_grad():
            self.tower += times_of(lambda: model.model.visual(pixels, grid_thw=grids), runs)
        self.token = int(model.generate(**prompt, **settings)[0, -1])


def compare(name: str, model: Any, workload: Workload, runs: int) -> Row:
    """One workload before and after, in turns: the speed of a shared machine's CPU drifts."""
    prompt = make_prompt(model, workload)
    text = text_alone(prompt)
    before, after, language_model = Measured(), Measured(), []
    fallbacks: dict[str, int] = {}
    each = -(-runs // ROUNDS)
    for _ in range(ROUNDS):
        language_model += times_of(lambda: model.generate(**text, max_new_tokens=1, do_sample=False), each)
        before.add(model, prompt, each)
        with vitgraph.accelerated(model, backend="native"):
            after.add(model, prompt, each)
            for reason, times in vitgraph.acceleration(model).fallbacks.items():
                fallbacks[reason] = fallbacks.get(reason, 0) + times
    length = prompt["input_ids"].shape[1]
    lists = (before.first_token, after.first_token, before.tower, after.tower, language_model)
    medians = [statistics.median(times) for times in lists]
    return Row(name, workload.name, length, *medians, before.peak, after.peak, before.token == after.token, fallbacks)


def table(rows: Sequence[Row]) -> Table:
    """Before -> after, for people."""
    made = Table()
    head = ("model", "input", "tokens", "first token ms", "speed-up", "tower ms", "tower's share", "LM ms", "peak GB")
    for column, title in enumerate(head):
        made.add_column(title, justify="left" if column < 2 else "right")
    for r in rows:
        shares = r.tower_before / r.first_token_before, r.tower_after / r.first_token_after
        made.add_row(
            r.model,
            r.workload,
            str(r.prompt_tokens),
            f"{r.first_token_before:.1f} -> {r.first_token_after:.1f}",
            f"{r.first_token_before / r.first_token_after:.2f}x",
            f"{r.tower_before:.1f} -> {r.tower_after:.1f}",
            f"{shares[0]:.0%} -> {shares[1]:.0%}",
            f"{r.language_model:.1f}",
            f"{r.peak_before / 1e9:.2f} -> {r.peak_after / 1e9:.2f}",
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["2b", "8b"], default=["2b", "8b"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small pictures, on any device")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny runs on the CPU")
    rows: list[Row] = []
    for size in ["tiny"] if args.tiny else args.models:
        model = make_model(size, device)
        rows += [compare(f"Qwen3-VL-{size}", model, one, args.runs) for one in (SMALL if args.tiny else FULL)]
        del model
    Console(width=140).print(table(rows))
    if args.json:
        report = {**environment(device), "runs": args.runs, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
