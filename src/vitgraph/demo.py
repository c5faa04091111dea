"""The demonstration: every family on real photographs, without a GPU and without a model hub.

The weights are random: the numbers are real, the meaning is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vitgraph.assets import sample_photographs
from vitgraph.bench.run import flatten_embeddings, relative_error
from vitgraph.commands.embedding_file import EmbeddingFile
from vitgraph.config import EncoderConfig
from vitgraph.embedding import VisionEmbedding
from vitgraph.encoder import VisionEncoder
from vitgraph.models.tiny import write_tiny_checkpoint
from vitgraph.pictures import Exhibit, PackFacts, describe_pack, draw_packing
from vitgraph.preprocess.inputs import Video

if TYPE_CHECKING:
    from vitgraph.models.contract import TowerSpec
    from vitgraph.models.registry import Family

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative error |packed - alone| / |alone| that rounding explains, by dtype."""

LONG_SIDES = (448, 320, 640, 224, 384, 288, 512)
CLIP_PATCHES = 4
CLIP_SIZE = (288, 192)
CLIP_FPS = 4.0


@dataclass(frozen=True)
class Sample:
    """One input of the demonstration and what the picture shows of it."""

    label: str
    image: Any
    exhibit: Exhibit


@dataclass(frozen=True)
class Demonstration:
    """What one family did.

    Attributes:
        family: registry name.
        packs: as planned and run.
        budgets: tokens of every budget, ascending.
        max_error, relative_error: packed result against one item at a time, eager.
        tolerance: what `relative_error` is held to.
        folder: where the checkpoint, the picture and the embeddings are.
    """

    family: str
    packs: tuple[PackFacts, ...]
    budgets: tuple[int, ...]
    max_error: float
    relative_error: float
    tolerance: float
    folder: Path

    @property
    def agrees(self) -> bool:
        """Whether packing changed nothing beyond rounding. A NaN does not agree."""
        return self.relative_error <= self.tolerance


def demonstrate(family: Family, out: Path, config: EncoderConfig, device: str | None = None) -> Demonstration:
    """Writes a tiny checkpoint, loads it as any other, encodes a mixed batch and compares with one by one.

    Args:
        family: which tower.
        out: a folder of this family's name is made in it.
        config: engine settings.
        device: default: CUDA if there is one.
    """
    folder = out / family.name
    checkpoint = write_tiny_checkpoint(family.name, folder / "checkpoint")
    with VisionEncoder.from_pretrained(checkpoint, device=device, config=config) as encoder:
        samples = make_samples(encoder.spec)
        encoder.capture()
        embeddings = encoder.encode([sample.image for sample in samples])
        alone = [encoder.encode([sample.image], mode="eager")[0] for sample in samples]
        packs = _describe(encoder, embeddings)
        packed, reference = flatten_embeddings(embeddings), flatten_embeddings(alone)
        _save(folder / "embeddings.safetensors", encoder, samples, embeddings)
        title = f"{family.title}: {len(samples)} inputs in {len(packs)} pack{'s' * (len(packs) != 1)}"
        draw_packing(packs, [sample.exhibit for sample in samples], title, folder / "packing.png")
        return Demonstration(
            family=family.name,
            packs=packs,
            budgets=tuple(budget.tokens for budget in encoder.budgets),
            max_error=float((packed.float() - reference.float()).abs().max()),
            relative_error=relative_error(packed, reference),
            tolerance=TOLERANCE[encoder.dtype],
            folder=folder,
        )


def make_samples(spec: TowerSpec) -> list[Sample]:
    """The shipped photographs at several sizes and, for families with video, a clip that pans over one of them."""
    photographs = [(path.stem, Image.open(path).convert("RGB")) for path in sample_photographs()]
    samples = []
    for number, side in enumerate(LONG_SIDES):
        name, photograph = photographs[number % len(photographs)]
        image = _resized(photograph, side)
        label = f"#{number} {name}"
        samples.append(Sample(label, image, Exhibit(label, [image])))
    if "video" in spec.modalities:
        widest = max(photographs, key=lambda named: named[1].width / named[1].height)
        samples.append(_clip(len(samples), *widest, spec.temporal_patch))
    return samples


def _clip(number: int, name: str, photograph: Image.Image, temporal_patch: int) -> Sample:
    """A camera that pans over the photograph, for as many frames as CLIP_PATCHES temporal patches take."""
    width, height = CLIP_SIZE
    scale = max(1.6 * width / photograph.width, height / photograph.height)
    wide = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
    travel, top = wide.width - width, (wide.height - height) // 2
    count = CLIP_PATCHES * temporal_patch
    starts = [travel * frame // (count - 1) for frame in range(count)]
    frames = [wide.crop((x, top, x + width, top + height)) for x in starts]
    label = f"#{number} clip of {name}"
    video = Video(frames, source_fps=CLIP_FPS, num_frames=count)
    return Sample(label, video, Exhibit(label, frames[::temporal_patch]))


def _resized(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _describe(encoder: VisionEncoder, embeddings: Sequence[VisionEmbedding]) -> tuple[PackFacts, ...]:
    tokens = [budget.tokens for budget in encoder.budgets]
    packs = encoder.plan([embedding.grid for embedding in embeddings])
    if not encoder.config.graph:
        packs = [replace(pack, budget=None, reason="graphs are off") for pack in packs]
    return tuple(
        describe_pack(pack, tokens, [encoder.spec.counts(piece.grid) for piece in pack.pieces]) for pack in packs
    )


def _save(path: Path, encoder: VisionEncoder, samples: Sequence[Sample], embeddings: Sequence[VisionEmbedding]) -> None:
    facts = {
        "model": f"tiny {encoder.spec.family} with random weights",
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
    with EmbeddingFile(path, facts) as target:
        for sample, embedding in zip(samples, embeddings, strict=True):
            target.add(sample.label, embedding)
