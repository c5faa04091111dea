"""What importing vitgraph loads."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "fastapi", "matplotlib", "av", "PIL", "typer", "numpy")


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.split())


def test_importing_the_package_is_light() -> None:
    assert not loaded_by("import vitgraph").intersection(HEAVY)


def test_the_encoder_needs_neither_transformers_nor_a_web_framework() -> None:
    modules = loaded_by("from vitgraph import VisionEncoder, EncoderConfig")
    assert not modules.intersection({"transformers", "fastapi", "matplotlib", "av", "typer"})


def test_no_cuda_context_is_made() -> None:
    code = "from vitgraph import VisionEncoder\nimport torch\nassert not torch.cuda.is_initialized()"
    loaded_by(code)


def test_public_names() -> None:
    import vitgraph

    assert all(hasattr(vitgraph, name) for name in vitgraph.__all__)
    assert {"VisionEncoder", "EncoderConfig", "VisionEmbedding", "Patches", "Video"} <= set(vitgraph.__all__)
