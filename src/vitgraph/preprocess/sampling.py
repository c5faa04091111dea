"""Which frames of a clip are encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vitgraph.errors import VideoError

Rule = Literal["spread", "stride", "seconds", "duration"]
"""`spread`: equally spaced from the first frame to the last (Qwen3-VL). `stride`: the starts of equal parts,
their number a multiple of the temporal patch (Qwen2-VL, Qwen2.5-VL). `seconds`: the frame at or after each tick of
the rate, and for a clip beyond `max_duration` the ticks of that long a clip, spread over it (GLM-4.1V). `duration`:
as many frames as a rate gives that falls with the clip's duration (GLM-4.6V)."""

TOKEN_RATES = ((30, 3.0), (300, 1.0), (math.inf, 0.5))
"""Temporal patches per second of rule `duration`, for clips of up to so many seconds."""
LONGEST = 2400
"""Seconds after which rule `duration` asks for no more frames."""
MOST_FRAMES = 640
"""Most frames that rule `duration` asks for."""


@dataclass(frozen=True)
class Sampling:
    """Frame sampling as in Transformers' video processors, with the same parameter names.

    Attributes:
        rule: of which family.
        fps: frames to take per second when the caller names neither a rate nor a number; rule `duration` has its own.
        min_frames, max_frames: bounds of the number of frames that a rate gives, by `spread` and `stride`;
            `max_frames` also of frames whose rate is unknown.
        temporal_patch_size: frames in a temporal patch.
        max_duration: seconds of a clip beyond which rule `seconds` takes no more frames.
    """

    rule: Rule = "spread"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2
    max_duration: float = 300.0

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

        The formulas are `sample_frames` of Transformers' Qwen2VLVideoProcessor, Qwen3VLVideoProcessor,
        Glm4vVideoProcessor and Glm46VVideoProcessor.
        Where it has no answer we choose one: frames of unknown rate are all taken, up to `max_frames`; a clip
        shorter than a temporal patch is taken whole; asking a rate of frames whose own rate is unknown is an error
        (Qwen3-VL there assumes 24 a second).

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
        if self.rule in ("seconds", "duration"):
            return self._ticks(total_num_frames, source_fps, fps, max_frames)
        rate = self.fps if fps is None else fps
        if self.rule == "stride":
            limit = limit // self.temporal_patch_size * self.temporal_patch_size
            count = min(max(total_num_frames / source_fps * rate, self.min_frames), limit, total_num_frames)
        else:
            count = min(max(int(total_num_frames / source_fps * rate), self.min_frames), limit, total_num_frames)
        return self._spread(total_num_frames, int(count), rounded=False)

    def _spread(self, total: int, count: int, *, rounded: bool) -> list[int]:
        if self.rule != "stride":
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

    def _ticks(self, total: int, source_fps: float, fps: float | None, max_frames: int | None) -> list[int]:
        """The rules of GLM: distinct frames, the last one repeated up to a whole temporal patch."""
        T = self.temporal_patch_size
        if self.rule == "seconds":
            found = self._at_seconds(total, source_fps, self.fps if fps is None else fps)
        else:
            found = self._by_duration(total, source_fps, fps)
        found = list(dict.fromkeys(found))
        found += found[-1:] * (-len(found) % T)
        if max_frames is None or len(found) <= max_frames:
            return found
        return [found[i] for i in np.linspace(0, len(found) - 1, max_frames).round().astype(int)]

    def _at_seconds(self, total: int, source_fps: float, fps: float) -> list[int]:
        duration = total / source_fps
        if duration <= self.max_duration:
            count = max(math.floor(duration * fps), 1)
            return [min(total - 1, math.ceil(i * source_fps / fps)) for i in range(count)]
        count = max(int(self.max_duration * fps), 1)
        if count >= total:
            return list(range(total))
        return [min(total - 1, math.ceil(second * source_fps)) for second in np.linspace(0, duration, count)]

    def _by_duration(self, total: int, source_fps: float, fps: float | None) -> list[int]:
        """A clip too short for one tick gives its first frame, where the reference gives none."""
        duration = total / source_fps
        if fps is None:
            fps = self.temporal_patch_size * next(rate for seconds, rate in TOKEN_RATES if duration <= seconds)
        count = max(min(int(min(duration, LONGEST) * fps), MOST_FRAMES), 1)
        if total < count:
            return np.linspace(0, total - 1, count, dtype=int).tolist()
        found: list[int] = []
        tick, step = 0.0, 1 / fps
        for frame in range(total):
            # the product with the rounded period, as the reference forms it
            if frame * (1 / source_fps) >= tick:
                found.append(frame)
                tick += step
                if tick >= int(duration):
                    break
        if len(found) < count:
            return np.linspace(found[0], found[-1], count, dtype=int).tolist()
        return found if len(found) == count else np.linspace(0, total - 1, count, dtype=int).tolist()


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
