"""Transformers' own common model tests on tiny models, as they are and accelerated: which tests change their outcome.

    python benchmarks/transformers_suite.py CHECKOUT [--models qwen3_vl qwen2_5_vl]

CHECKOUT is a checkout of Transformers, or an unpacked source distribution (`pip download --no-binary transformers
--no-deps transformers==VERSION`), of the version that is installed. The suite needs the package `parameterized`.

A few tests fail on the models as they are: the suite expects sizes of its own, and a source distribution lacks tests of
generation. What counts is that acceleration changes no outcome.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
MODELS = ("qwen3_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "glm4v", "glm_ocr", "kimi_k25", "internvl")


def outcomes(checkout: Path, model: str, accelerate: bool) -> tuple[dict[str, str], int]:
    """Test -> passed, failed or skipped; and how many calls vitgraph's tower ran."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        values = {"SUITE_ROOT": str(checkout), "SUITE_MODEL": model, "SUITE_ACCELERATE": str(int(accelerate))}
        paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        options = [
            "-q",
            "-s",
            f"--junitxml={report}",
            "-c",
            os.devnull,
            "--rootdir",
            str(HERE),
            "-p",
            "no:cacheprovider",
        ]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(HERE / "transformers_suite_tests.py")],
            env={**os.environ, **values, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise SystemExit(run.stdout[-2000:] + run.stderr[-2000:])
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found = {case.get("name", ""): _outcome(case) for case in cases}
    calls = re.search(r"calls of the tower: (\d+)", run.stdout)
    return found, int(calls.group(1)) if calls else 0


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def count(results: dict[str, str]) -> str:
    """How many tests had which outcome."""
    values = list(results.values())
    return ", ".join(f"{values.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def main() -> None:
    """Runs both, prints both counts and every test whose outcome differs; exits 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    args = parser.parse_args()
    changed = 0
    for model in args.models:
        plain, _ = outcomes(args.checkout.resolve(), model, accelerate=False)
        fast, calls = outcomes(args.checkout.resolve(), model, accelerate=True)
        print(f"{model}: as it is {count(plain)}; accelerated {count(fast)}, the tower ran {calls} calls")
        for name in sorted(plain.keys() | fast.keys()):
            if plain.get(name) != fast.get(name):
                changed += 1
                print(f"  {name}: {plain.get(name)} -> {fast.get(name)}")
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
