"""The documentation says what the code does.

Tables between `<!-- begin: NAME -->` and `<!-- end: NAME -->` are made from the code. To write them anew:

    PYTHONPATH=src python tests/docs/test_docs.py
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer

from vitgraph.assets import sample_photographs
from vitgraph.attention.sdpa import SdpaAttention
from vitgraph.cli import app
from vitgraph.config import VLLM_ALIASES, EncoderConfig
from vitgraph.core import Grid
from vitgraph.engine.stats import Stats
from vitgraph.models import registry
from vitgraph.models.contract import Tower, TowerSpec
from vitgraph.models.registry import Family, families
from vitgraph.models.tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vitgraph"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REWRITE = "run `PYTHONPATH=src python tests/docs/test_docs.py` to write it anew"
SECONDS_PER_EXAMPLE = 60


# -- tables made from the code ---------------------------------------------------------------------------------


def family_table() -> str:
    rows = []
    for family in families():
        tower = meta_tower(family)
        rows.append(
            (
                family.title,
                ", ".join(f"`{name}`" for name in family.model_types),
                _yes("image" in family.modalities),
                _yes("video" in family.modalities),
                _yes(tower.spec.deepstack > 0),
                _summary(tower),
            )
        )
    return _table(("Family", "`model_type`", "Image", "Video", "Deepstack", "Inside the graph"), rows)


def settings_table() -> str:
    aliases = {name: alias for alias, name in VLLM_ALIASES.items()}
    rows = [
        (f"`{f.name}`", f"`{f.default}`", f.metadata["help"], f"`{aliases[f.name]}`" if f.name in aliases else "")
        for f in fields(EncoderConfig)
    ]
    return _table(("Setting", "Default", "Meaning", "vLLM's name"), rows)


def family_sections() -> str:
    return "\n\n".join(
        _family_section(module, family) for module, family in zip(registry.MODULES, families(), strict=True)
    )


def _family_section(module: str, family: Family) -> str:
    tower = meta_tower(family)
    spec = tower.spec
    description = inspect.getdoc(import_module(f"vitgraph.models.{module}"))
    layouts = family.layouts(family.parse_config(family.tiny()[0]))
    rows = [
        ("Name in the registry", f"`{family.name}`, in [models/{module}.py](../src/vitgraph/models/{module}.py)"),
        ("`model_type`", ", ".join(f"`{name}`" for name in family.model_types)),
        ("Inputs", " and ".join({"image": "images", "video": "clips"}[m] for m in family.modalities)),
        ("Inside the graph", _summary(tower)),
        ("Outputs", "tokens `[M, C]`" + (" and deepstack maps `[levels, M, C]`" if spec.deepstack else "")),
        ("Merge", f"{spec.merge} x {spec.merge} patches to a token"),
        ("Temporal patch", f"{spec.temporal_patch} frame{'s' * (spec.temporal_patch > 1)}"),
        ("Attention segments", "; ".join(_segments(spec)) or "none"),
        ("Metadata buffers", "<br>".join(_buffers(spec)) or "none"),
        ("A clip that no budget holds", _long_clip(spec)),
        ("Checkpoint layouts", "; ".join(f"`{layout.name}`" for layout in layouts)),
    ]
    return f"## {family.title}\n\n{description}\n\n{_table(('', ''), rows)}"


def _segments(spec: TowerSpec) -> Iterator[str]:
    frames = 3
    counts = spec.counts(Grid(frames, spec.merge, spec.merge))
    item = "item" if "video" in spec.modalities else "image"
    for segments in spec.segments:
        rows = next(b.rows for b in spec.buffers if b.name == segments.name)
        kind = {frames: "temporal patch", 1: item}.get(counts[rows], rows) if rows == "segment" else rows
        yield f"`{segments.name}`: one per {item if item == 'image' else kind}"


def _buffers(spec: TowerSpec) -> Iterator[str]:
    plural = {"patch": "patches"}
    for buffer in spec.buffers:
        rows = plural.get(buffer.rows, f"{buffer.rows}s") + (f" + {buffer.lead}" if buffer.lead else "")
        yield f"`{buffer.name}` {buffer.dtype} [{', '.join([rows, *map(str, buffer.trailing)])}]"


def _long_clip(spec: TowerSpec) -> str:
    if "video" not in spec.modalities:
        return "no clips"
    return "is cut between frames" if spec.splits_by_frame else "runs eager as a whole"


def file_table() -> str:
    rows = []
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (p.parent != PACKAGE, p.parent, p.name)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            name = path.relative_to(PACKAGE).as_posix()
            first = " ".join(text.split("\n\n")[0].split())
            rows.append((f"[{name}](../src/vitgraph/{name})", first))
    return _table(("File", "What it is"), rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "families": (README, family_table),
    "settings": (README, settings_table),
    "family sections": (ROOT / "docs" / "models.md", family_sections),
    "files": (ROOT / "docs" / "structure.md", file_table),
}


def meta_tower(family: Family) -> Tower:
    with torch.device("meta"):
        return family.build(family.parse_config(family.tiny()[0]), SdpaAttention())


def _summary(tower: Tower) -> str:
    return (inspect.getdoc(type(tower)) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def region(text: str, name: str) -> tuple[int, int]:
    """Where the text between the two marks of a table starts and ends."""
    begin, end = f"<!-- begin: {name} -->\n", f"\n<!-- end: {name} -->"
    assert text.count(begin) == 1, f"expected one {begin.strip()}"
    start = text.index(begin) + len(begin)
    return start, text.index(end, start - 1)


def write_tables() -> None:
    for name, (path, make) in TABLES.items():
        text = path.read_text(encoding="utf-8")
        start, end = region(text, name)
        path.write_text(text[:start] + make() + text[end:], encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_tables_equal_the_code(name: str) -> None:
    path, make = TABLES[name]
    text = path.read_text(encoding="utf-8")
    start, end = region(text, name)
    assert text[start:end] == make(), f"the table {name!r} of {path.name} is out of date; {REWRITE}"


def test_the_models_table_lists_every_registered_family() -> None:
    table = family_table()
    for family in families():
        assert table.count(f"| {family.title} |") == 1
        assert all(f"`{name}`" in table for name in family.model_types)


def test_no_note_on_a_registered_family_is_still_a_comment() -> None:
    hidden = re.findall(r"<!-- with (\w+):", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    registered = {name for family in families() for name in family.model_types}
    assert not registered.intersection(hidden), "move these rows into the table of notes"


def test_the_settings_table_lists_every_field_and_alias() -> None:
    text = README.read_text(encoding="utf-8")
    for name in [*(f.name for f in fields(EncoderConfig)), *VLLM_ALIASES]:
        assert f"`{name}`" in text


# -- examples and code -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_runs(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every example, two at a time."""
    folder = tmp_path_factory.mktemp("examples")
    waiting, running, done = list(EXAMPLES), {}, {}
    while waiting or running:
        while waiting and len(running) < 2:
            path = waiting.pop(0)
            running[path] = subprocess.Popen(
                [sys.executable, str(path)],
                cwd=folder,
                env=_environment(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        for path, process in list(running.items()):
            if process.poll() is not None:
                out, err = process.communicate()
                done[path.name] = subprocess.CompletedProcess(path, process.returncode, out, err)
                del running[path]
        time.sleep(0.05)
    return done


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("encode_images.py", ["cat.jpg", "tokens [", "5 images in"]),
        ("encode_patches.py", ["grid_thw [[", "image positions", "largest difference from eager: "]),
        ("mixed_batch.py", ["ImageError", "clip over coffee", "BatchError for item [2]; 4 results"]),
        ("transformers_generate.py", ["random weights", "the same: True", "native", "restored: not accelerated"]),
        ("settings.py", ["'budgets': (64, 256, 1024)", "-> budget", "larger than the largest budget", "unknown"]),
    ],
)
def test_examples_run(name: str, expected: list[str], example_runs) -> None:
    run = example_runs[name]
    assert run.returncode == 0, run.stderr
    assert not run.stderr.strip() or "Traceback" not in run.stderr
    for text in expected:
        assert text in run.stdout


def test_every_example_is_listed_in_the_readme_and_states_its_command() -> None:
    text = README.read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f"examples/{path.name}" in text
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring and f"python examples/{path.name}" in docstring


def code_blocks(path: Path, mark: str) -> list[tuple[str, str]]:
    """(rest of the mark, code) of the Python blocks that follow a comment starting with `mark`."""
    pattern = rf"<!-- {mark}(.*?) -->\n```python\n(.*?)```"
    return re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory) -> Path:
    """What the README's reader has: photographs, a clip and a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    for photograph in sample_photographs():
        shutil.copyfile(str(photograph), folder / photograph.name)
    _write_clip(folder / "clip.mp4")
    write_tiny_checkpoint("qwen3_vl", folder / "model")
    return folder


def _write_clip(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shade in range(16):
            picture = torch.full((64, 96, 3), 8 * shade, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_the_readme_has_a_start_of_at_most_ten_lines() -> None:
    _, first = code_blocks(README, "runnable")[0]
    assert len(first.strip().splitlines()) <= 10


@pytest.mark.parametrize("number", range(len(code_blocks(README, "runnable"))))
def test_code_of_the_readme_runs(number: int, reader_folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(reader_folder)
    namespace: dict[str, object] = {}
    for _, code in code_blocks(README, "runnable")[: number + 1]:
        code = re.sub(r'"[A-Za-z]+/[A-Z][\w.-]+"', '"model"', code)
        exec(compile(code, f"README block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_excerpts_are_in_the_code(path: Path) -> None:
    for source, code in code_blocks(path, "from: "):
        lines = {line.strip() for line in (ROOT / source).read_text(encoding="utf-8").splitlines()}
        missing = [line for line in code.splitlines() if line.strip() not in {*lines, "...", ""}]
        assert not missing, f"{source} has no such lines"


# -- statements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in _anchors(page), f"{path.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=lambda p: p.name)
def test_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.])(?:/(?:work|home|root|tmp|Users|mnt|data|opt)\b\S*|[A-Z]:\\\S*)", text)
    assert not found


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_and_flags_exist(path: Path) -> None:
    commands = typer.main.get_command(app).commands
    text = path.read_text(encoding="utf-8")
    spans = [
        span for block in re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL) for span in block.split("\n")
    ]
    spans += re.findall(r"`([^`\n]+)`", _without_code(text))
    for span in spans:
        match = re.search(r"(?:^|/|&& )vitgraph ([a-z][\w-]*)(.*)", span)
        if not match:
            continue
        name, rest = match.groups()
        assert name in commands, f"{path.name} names `vitgraph {name}`"
        known = {flag for p in commands[name].params for flag in [*p.opts, *p.secondary_opts]} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= known, span


def test_the_readme_names_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"`vitgraph {name}" in text


def test_the_counters_are_all_explained() -> None:
    text = (ROOT / "docs" / "graphs.md").read_text(encoding="utf-8")
    for field in fields(Stats):
        assert f"`{field.name}`" in text


def test_line_counts_are_about_right() -> None:
    text = (ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    claims = re.findall(r"`([\w./]+\.py)` has about (\d+) lines", text)
    assert claims
    for name, lines in claims:
        count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(count - int(lines)) <= 0.1 * count, f"{name} has {count} lines"


def layers_of_the_package() -> dict[str, int]:
    """Layer of every file and folder of the package, as docs/structure.md lists them."""
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE)
    return {name.rstrip("/"): int(layer) for layer, names in rows for name in re.findall(r"`([^`]+)`", names)}


def test_imports_go_downwards() -> None:
    layers = layers_of_the_package()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0]
        if own == "__init__.py":
            continue
        assert own in layers, f"{own} is in no layer of docs/structure.md"
        for target in _imports(path):
            other = target if target in layers else f"{target}.py"
            assert layers[other] <= layers[own], f"{path.relative_to(PACKAGE)} imports {target} from a layer above"


def _imports(path: Path) -> set[str]:
    """Top-level names of vitgraph that a file imports, wherever in it."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    return {n.module.split(".")[1] for n in nodes if n.module and n.module.startswith("vitgraph.")}


if __name__ == "__main__":
    write_tables()
