"""Evaluation metrics as sums and counts: any split of a set over batches and devices gives the same figures."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


@flax.struct.dataclass
class Metrics:
    """Sums over examples: int32 counts, the loss in float32; `class_*` are [num_classes]."""

    count: jax.Array
    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    class_count: jax.Array
    class_top1: jax.Array

    @classmethod
    def from_logits(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
        """logits float [B, num_classes], labels int32 [B], mask bool [B]: False for examples that only fill a batch."""
        num_classes = logits.shape[-1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, best = jax.lax.top_k(logits, min(5, num_classes))  # of equal logits the lower class comes first
        hits = (best == labels[:, None]) & mask[:, None]
        counted = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32) * mask[:, None]
        return cls(
            count=jnp.sum(mask, dtype=jnp.int32),
            loss=jnp.sum(jnp.where(mask, loss, 0.0)),
            top1=jnp.sum(hits[:, 0], dtype=jnp.int32),
            top5=jnp.sum(hits, dtype=jnp.int32),
            class_count=jnp.sum(counted, axis=0),
            class_top1=jnp.sum(counted * hits[:, :1], axis=0),
        )

    @staticmethod
    def summarize(parts: list[Metrics]) -> dict[str, object]:
        """Adds up batches, in float64 on the host, and divides.

        Returns top1 and top5 (fractions of 1), loss (nats), examples, and class_top1 (a list; None where a class has
        no example).
        """
        total = jax.tree.map(lambda *xs: np.sum(np.stack(xs).astype(np.float64), axis=0), *jax.device_get(parts))
        per_class = zip(total.class_top1, total.class_count, strict=True)
        return {
            "top1": float(total.top1 / total.count),
            "top5": float(total.top5 / total.count),
            "loss": float(total.loss / total.count),
            "examples": int(total.count),
            "class_top1": [float(hits / count) if count else None for hits, count in per_class],
        }
