"""Evaluation metrics as sums and counts: any split of a set over batches and devices gives the same values.

A metric is a class with `sums`, of one batch on the device, and `compute`, of all of them on the host; METRICS lists
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

Sums = dict[str, dict[str, jax.Array]]  # {metric: {name: sum over examples}}


class Metric(Protocol):
    """logits float32 [B, num_classes], labels int32 [B], mask bool [B]: False for examples that only fill a batch."""

    @staticmethod
    def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Sums over the batch; int32 for counts."""

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """{name: value} from the sums over all batches, float64."""


class Accuracy:
    """top1 and top5, fractions of 1, and the number of examples. Of equal logits the lower class comes first."""

    @staticmethod
    def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == labels[:, None]) & mask[:, None]
        return {
            "examples": jnp.sum(mask, dtype=jnp.int32),
            "top1": jnp.sum(hits[:, 0], dtype=jnp.int32),
            "top5": jnp.sum(hits, dtype=jnp.int32),
        }

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        count = sums["examples"]
        return {"top1": float(sums["top1"] / count), "top5": float(sums["top5"] / count), "examples": int(count)}


class Loss:
    """The mean cross-entropy, in nats."""

    @staticmethod
    def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"count": jnp.sum(mask, dtype=jnp.int32), "loss": jnp.sum(jnp.where(mask, loss, 0.0))}

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"loss": float(sums["loss"] / sums["count"])}


class ExpectedCalibrationError:
    """ece: how far confidence and accuracy lie apart, in 15 equal bins of confidence (Guo et al., 2017, equation 3).

    The confidence of an example is the largest of its probabilities; a bin holds those in (i / 15, (i + 1) / 15].
    """

    BINS = 15

    @classmethod
    def sums(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        confidence = jnp.max(jax.nn.softmax(logits), -1)
        bins = jnp.clip(jnp.ceil(confidence * cls.BINS).astype(jnp.int32) - 1, 0, cls.BINS - 1)
        inside = (bins[:, None] == jnp.arange(cls.BINS)[None]) & mask[:, None]
        right = jnp.argmax(logits, -1) == labels
        return {
            "count": jnp.sum(inside, axis=0, dtype=jnp.int32),
            "right": jnp.sum(inside & right[:, None], axis=0, dtype=jnp.int32),
            "confidence": jnp.sum(jnp.where(inside, confidence[:, None], 0.0), axis=0),
        }

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"ece": float(np.sum(np.abs(sums["right"] - sums["confidence"])) / np.sum(sums["count"]))}


class ClassAccuracy:
    """class_top1: a list of top-1 by class; None where a class has no example."""

    @staticmethod
    def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        counted = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.int32) * mask[:, None].astype(jnp.int32)
        hits = (jnp.argmax(logits, -1) == labels)[:, None].astype(jnp.int32)
        return {"count": jnp.sum(counted, axis=0), "top1": jnp.sum(counted * hits, axis=0)}

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        pairs = zip(sums["top1"], sums["count"], strict=True)
        return {"class_top1": [float(hits / count) if count else None for hits, count in pairs]}


class Confusion:
    """confusion: how many examples of class i are taken for class j, [i][j]; not there for more than 40 classes."""

    MOST = 40

    @classmethod
    def sums(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        classes = logits.shape[-1]
        if classes > cls.MOST:
            return {}
        counts = jnp.zeros((classes, classes), jnp.int32)
        return {"count": counts.at[labels, jnp.argmax(logits, -1)].add(mask.astype(jnp.int32))}

    @staticmethod
    def compute(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"confusion": sums["count"].astype(int).tolist()} if sums else {}


METRICS: tuple[type[Metric], ...] = (Accuracy, Loss, ExpectedCalibrationError, ClassAccuracy, Confusion)


def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """The sums of every metric over one batch; arguments as in `Metric`."""
    return {metric.__name__: metric.sums(logits, labels, mask) for metric in METRICS}


def compute(parts: list[Sums]) -> dict[str, Any]:
    """The values of every metric: sums of batches are added up in float64 on the host.

    Returns top1, top5 (fractions of 1), examples, loss (nats), ece, class_top1 and confusion. There must be an example.
    """
    total = jax.tree.map(lambda *xs: np.sum(np.stack(xs).astype(np.float64), axis=0), *jax.device_get(parts))
    return {name: value for metric in METRICS for name, value in metric.compute(total[metric.__name__]).items()}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are one number and no count."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def is_better(new: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether an evaluation is the best so far, by top-1; of equals the first is the best."""
    return best is None or new["top1"] > best["top1"]


def best_step(evaluated: Iterable[tuple[int, Mapping[str, Any] | None]]) -> int | None:
    """The step with the best metrics of (step, metrics), in the order of the steps; None where none was evaluated."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for step, metrics in sorted(evaluated, key=lambda pair: pair[0]):
        if metrics and is_better(metrics, best and best[1]):
            best = step, metrics
    return best and best[0]


def by_rank(evaluated: Mapping[int, Mapping[str, Any] | None]) -> list[int]:
    """The evaluated steps, the best first."""
    left, ranked = dict(evaluated), []
    while (step := best_step(left.items())) is not None:
        ranked.append(step)
        del left[step]
    return ranked
