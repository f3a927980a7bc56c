"""What attention modules do over a whole split: tables on the console and on a page."""

from __future__ import annotations

import sys

import rich.console
import rich.table

from resattn_jax.classifier import Classifier
from resattn_jax.mask_statistics import NEAR, Summary
from resattn_jax.report.page import render


def print_summary(summary: Summary) -> None:
    """Prints the response of each stage and a row for each module."""
    console = rich.console.Console(highlight=False, file=sys.stdout)
    console.print(f"{summary.examples:,} examples, top-1 {summary.top1:.2%}, loss {summary.loss:.4f}", soft_wrap=True)
    table = rich.table.Table("stage", "mean |response|")
    for stage, response in summary.responses.items():
        table.add_row(stage, f"{response:.3f}")
    console.print(table)
    table = rich.table.Table("module", "|T|", "after", "out", "top-1", "loss")
    table.caption = "mean |response|; top-1 and loss with the mean of the module's masks"
    for name, m in summary.modules.items():
        responses = (f"{value:.3f}" for value in (m.trunk, m.product, m.output))
        table.add_row(name, *responses, f"{m.top1_mean_mask:.2%}", f"{m.loss_mean_mask:.4f}")
    console.print(table)
    table = rich.table.Table("mask", "mean", "std", "over pictures", "near 0", "near 1")
    for name, m in summary.modules.items():
        moments = (f"{value:.3f}" for value in (m.mask_mean, m.mask_std, m.mask_std_over_examples))
        table.add_row(name, *moments, f"{m.near_zero:.1%}", f"{m.near_one:.1%}")
    console.print(table)


def summary_page(net: Classifier, summary: Summary) -> bytes:
    """The same as a page."""
    spec = net.model.spec
    return render(
        "attention_summary.html",
        net=str(net),
        model=net.config.model.name,
        kind=spec.attention,
        learning=spec.learning,
        product="(1 + M) · T" if spec.learning == "arl" else "M · T",
        near=NEAR,
        summary=summary,
        most=max(summary.responses.values(), default=0) or 1,
    )
