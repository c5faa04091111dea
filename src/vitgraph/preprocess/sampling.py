"""Which frames of a clip are encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vitgraph.errors import VideoError

Rule = Literal["spread", "stride"]
"""`spread`: equally spaced from the first frame to the last (Qwen3-VL). `stride`: the starts of equal parts,
their number a multiple of the temporal patch (Qwen2-VL, Qwen2.5-VL)."""


@dataclass(frozen=True)
class Sampling:
    """Frame sampling as in Transformers' video processors, with the same parameter names.

    Attributes:
        rule: of which family.
        fps: frames to take per second when the caller names neither a rate nor a number.
        min_frames, max_frames: bounds of the number of frames that a rate gives.
        temporal_patch_size: frames in a temporal patch.
    """

    rule: Rule = "spread"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2

    def indices(
        self,
        total_num_frames: int,
        source_fps: float | None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
    ) -> list[int]:
        """Indices of the frames to take, ascending; one may repeat.

        The formulas are `sample_frames` of Transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
        Where it has no answer we choose one: frames of unknown rate are all taken, up to `max_frames`; a clip
            shorter than a
        temporal patch is taken whole; asking a rate of frames whose own rate is unknown is an error (Qwen3-VL
        there assumes 24 a second).

        Args:
            total_num_frames: frames of the source.
            source_fps: its rate, if known.
            fps: frames to take per second.
            num_frames: frames to take over the whole clip, instead of `fps`.
            max_frames: replaces the attribute of that name, and limits `num_frames` as well.

        Raises:
            VideoError: an argument is out of range, or both or neither of what is needed is known.
        """
        _check(total_num_frames, source_fps, fps, num_frames, max_frames)
        limit = self.max_frames if max_frames is None else max_frames
        if num_frames is not None:
            count: float = num_frames if max_frames is None else min(num_frames, max_frames)
            return self._spread(total_num_frames, int(count), rounded=True)
        if source_fps is None:
            if fps is not None:
                raise VideoError(
                    f"fps={fps:g} was asked of frames whose own rate is unknown. Give source_fps too, or num_frames."
                )
            if total_num_frames <= limit:
                return list(range(total_num_frames))
            return self._spread(total_num_frames, limit, rounded=False)
        rate = self.fps if fps is None else fps
        if self.rule == "stride":
            limit = limit // self.temporal_patch_size * self.temporal_patch_size
            count = min(max(total_num_frames / source_fps * rate, self.min_frames), limit, total_num_frames)
        else:
            count = min(max(int(total_num_frames / source_fps * rate), self.min_frames), limit, total_num_frames)
        return self._spread(total_num_frames, int(count), rounded=False)

    def _spread(self, total: int, count: int, *, rounded: bool) -> list[int]:
        if self.rule == "spread":
            return np.linspace(0, total - 1, max(count, 1)).round().astype(int).tolist()
        if total <= self.temporal_patch_size:
            return list(range(total))
        T = self.temporal_patch_size
        count = max((round(count / T) if rounded else count // T) * T, T)
        if count > total:
            raise VideoError(
                f"{count} frames were asked of a clip that has {total}. Ask for at most {total // T * T} "
                f"(num_frames is rounded to a multiple of {T})."
            )
        import torch  # its arange rounds in its own way, and the reference uses it

        # rounding can add an element past the end of the clip
        return torch.arange(0, total, total / count).int()[:count].tolist()


def _check(
    total: int, source_fps: float | None, fps: float | None, num_frames: int | None, max_frames: int | None
) -> None:
    if total < 1:
        raise VideoError("the clip has no frames. Pass at least one.")
    if fps is not None and num_frames is not None:
        raise VideoError(f"fps={fps:g} and num_frames={num_frames} were both given; choose one.")
    for name, value in (
        ("fps", fps),
        ("source_fps", source_fps),
        ("num_frames", num_frames),
        ("max_frames", max_frames),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise VideoError(f"{name} is {value}; expected a positive number, or None.")
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and value != int(value):
            raise VideoError(f"{name} is {value}; expected a whole number of frames.")
