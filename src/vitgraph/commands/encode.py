"""`vitgraph encode`: files in, one safetensors file of embeddings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitgraph.commands.embedding_file import EmbeddingFile
from vitgraph.commands.files import find_files, is_video
from vitgraph.commands.outputs import check_writable, console, human_bytes, log
from vitgraph.commands.settings import with_encoder_flags
from vitgraph.config import EncoderConfig
from vitgraph.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from vitgraph.encoder import VisionEncoder

SOME_FAILED = 1
Failures = dict[str, InputError]


@with_encoder_flags()
def encode(
    config: EncoderConfig,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    files: Annotated[
        list[str],
        typer.Argument(help="Images, videos, folders (searched recursively) and globs such as 'photos/**/*.jpg'."),
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("embeddings.safetensors"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Files decoded and encoded at a time; bounds memory.")] = 32,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu. Default: cuda if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16 on CUDA, float32 on the CPU.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second of video.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames to sample over a whole video.")] = None,
    video_max_frames: Annotated[int | None, typer.Option(help="Most frames to sample from a video.")] = None,
    video_min_pixels: Annotated[int | None, typer.Option(help="Least pixels of a resized video.")] = None,
    video_max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a resized video.")] = None,
) -> None:
    """Encode images and videos into a safetensors file.

    The file holds, per input, `<path>` with its tokens [M, C] and, for families with deepstack, `<path>.deepstack`
    [levels, M, C]; its header lists the files with their grids. A bad file is reported and skipped: the others are
    written and the exit code is 1.
    """
    check_writable(out, force)
    found = find_files(files)
    _check_video_extra(found.files)
    failures: Failures = dict(found.failures)
    if found.files:
        from vitgraph.encoder import VisionEncoder

        with VisionEncoder.from_pretrained(model, device=device, dtype=dtype, config=config) as encoder:
            facts = {"model": model, "family": encoder.spec.family, "dtype": str(encoder.dtype).removeprefix("torch.")}
            batches = _batches(
                found.files,
                batch,
                fps=fps,
                num_frames=num_frames,
                max_frames=video_max_frames,
                min_pixels=video_min_pixels,
                max_pixels=video_max_pixels,
            )
            with EmbeddingFile(out, facts) as target:
                failures |= _encode_all(encoder, batches, len(found.files), target)
    _report(out, len(found.files) + len(found.failures), failures)
    if failures:
        raise typer.Exit(SOME_FAILED)


def _check_video_extra(files: Sequence[Path]) -> None:
    """Refuses videos that could not be decoded before anything is encoded."""
    if any(is_video(path) for path in files) and find_spec("av") is None:
        raise MissingExtraError("av", "video", "decoding a video file")


def _batches(files: Sequence[Path], size: int, **sampling: Any) -> Iterator[list[tuple[str, Any]]]:
    """Lists of (key, input), `size` files at a time; `sampling` are fields of `Video`."""
    from vitgraph.preprocess.inputs import Video

    for start in range(0, len(files), size):
        yield [
            (path.as_posix(), Video(path, **sampling) if is_video(path) else path)
            for path in files[start : start + size]
        ]


def _encode_all(
    encoder: VisionEncoder, batches: Iterator[list[tuple[str, Any]]], total: int, target: EmbeddingFile
) -> Failures:
    from vitgraph.progress import progress_bar

    encoder.capture()
    failures: Failures = {}
    done = 0
    with progress_bar("encoding") as update:
        update(0, total, "")
        for batch in batches:
            results = encoder.encode([image for _, image in batch], on_error="return")
            for (key, _), result in zip(batch, results, strict=True):
                if isinstance(result, InputError):
                    failures[key] = result
                else:
                    target.add(key, result)
            done += len(batch)
            update(done, total, f"{len(failures)} failed" if failures else "")
    return failures


def _report(out: Path, asked: int, failures: Failures) -> None:
    encoded = asked - len(failures)
    if failures:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{len(failures)} of {asked} inputs failed", title_justify="left")
        table.add_column("input", overflow="fold")
        table.add_column("reason", overflow="fold")
        for key, error in failures.items():
            table.add_row(Text(key), Text(str(error)))
        log().print(table)
    if encoded:
        console().print(f"encoded {encoded} of {asked} inputs into {out} ({human_bytes(out.stat().st_size)})")
    else:
        console().print(f"encoded none of {asked} inputs; {out} was not written")
