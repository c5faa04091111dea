"""`vitgraph demo`: every family on real photographs, without a GPU and without a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitgraph.commands.outputs import console
from vitgraph.commands.settings import with_encoder_flags
from vitgraph.config import EncoderConfig

if TYPE_CHECKING:
    from rich.console import Console

    from vitgraph.demo import Demonstration
    from vitgraph.models.registry import Family

NOTICE = "tiny towers with random weights: the numbers are real, the meaning is not"


@with_encoder_flags(max_tokens=512)
def demo(
    config: EncoderConfig,
    family: Annotated[str, typer.Option(help="A family's name, or 'all'.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, pictures and embeddings.")] = Path("vitgraph-demo"),
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu. Default: cuda if there is one.")] = None,
) -> None:
    """Encode photographs with a tiny tower of every family and check the packed result.

    Writes tiny checkpoints with random weights, loads each as any other checkpoint, encodes a mixed batch in packs,
    compares with one item at a time, and draws the packs. Exit code 1 when they differ by more than rounding.
    """
    from vitgraph.demo import demonstrate
    from vitgraph.models.registry import families, get_family

    chosen = families() if family == "all" else (get_family(family),)
    screen = console()
    screen.print(NOTICE, style="bold")
    results = []
    for row in chosen:
        result = demonstrate(row, out, config, device)
        _print(screen, row, result)
        results.append(result)
    if not all(result.agrees for result in results):
        raise typer.Exit(1)


def _print(screen: Console, family: Family, result: Demonstration) -> None:
    from rich.table import Table

    budgets = result.budgets if any(facts.pack.budget is not None for facts in result.packs) else ()
    span = f"{len(budgets)} budgets, {budgets[0]} to {budgets[-1]} tokens" if budgets else "all eager"
    table = Table(title=f"{family.title}: {span}", title_justify="left")
    for name in ("pack", "budget", "items", "real tokens", "padding", "reason for eager"):
        table.add_column(name, justify="left" if name.startswith("reason") else "right")
    for index, facts in enumerate(result.packs):
        pack = facts.pack
        budget = "-" if pack.budget is None else str(facts.capacity)
        table.add_row(
            str(index), budget, str(len(pack.pieces)), str(sum(facts.tokens)), f"{facts.padding:.1%}", pack.reason
        )
    screen.print(table)
    verdict = "[green]agrees[/green]" if result.agrees else "[red]DIFFERS[/red]"
    screen.print(
        f"packed against one by one: {verdict}, max |difference| {result.max_error:.1e}, "
        f"relative {result.relative_error:.1e} (limit {result.tolerance:.0e})"
    )
    screen.print(f"wrote {result.folder}/: checkpoint/, packing.png, embeddings.safetensors\n", soft_wrap=True)
