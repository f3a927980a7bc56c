"""What a net gets right and wrong over a split: of each example four numbers are kept, so that any split fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics
from jax.sharding import PartitionSpec as P

from resattn_jax import metrics
from resattn_jax.data.pipelines import EvalStream
from resattn_jax.errors import UsageError
from resattn_jax.experiment import Experiment
from resattn_jax.metrics import ExpectedCalibrationError
from resattn_jax.runtime import compiler_options, device_faults
from resattn_jax.train_step import predict


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """What a net says of N examples.

    metrics: what `metrics.compute` gives. rows int32 [N]: of the examples in the split. labels, predicted int32 [N].
    confidence float32 [N]: the probability of what is predicted. bins: the sums of `ExpectedCalibrationError`, each
    float64 [15].
    """

    metrics: dict[str, Any]
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    bins: dict[str, np.ndarray]

    def confusion(self, classes: int) -> np.ndarray:
        """int64 [classes, classes]: how many examples of class i are taken for class j."""
        return sklearn.metrics.confusion_matrix(self.labels, self.predicted, labels=np.arange(classes))

    def most_confident_mistakes(self, count: int) -> np.ndarray:
        """Places in the arrays, int [≤ count], of what is wrong, the most confident first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")[:count]]


def assess(experiment: Experiment, variables: Any, stream: EvalStream) -> Assessment:
    """Measures a net over a stream, on the devices of one host, in one pass.

    Raises UsageError when no example can be read, and RunError when a device is out of memory.
    """
    step = _step(experiment, stream)
    parts, kept = [], []
    with device_faults(f"evaluating {experiment.eval_batch_size} images at a time; lower config.eval.batch_size"):
        for number, (batch, counts) in enumerate(stream):
            sums, *of_each = jax.device_get(step(variables, stream.arrays, batch, counts))
            parts.append(sums)
            kept.append([values[np.asarray(counts)] for values in (stream.rows(number), *of_each)])
    if not any(len(rows) for rows, *_ in kept):
        raise UsageError("not one example of the evaluation split could be read")
    rows, labels, predicted, confidence = (np.concatenate(values) for values in zip(*kept, strict=True))
    binned = [part[ExpectedCalibrationError.__name__] for part in parts]
    return Assessment(
        metrics=metrics.compute(parts),
        rows=rows,
        labels=labels,
        predicted=predicted,
        confidence=confidence,
        bins={key: np.asarray(np.sum([b[key] for b in binned], axis=0, dtype=np.float64)) for key in binned[0]},
    )


def _step(experiment: Experiment, stream: EvalStream) -> Callable[..., Any]:
    """(variables, arrays, batch, mask bool [B]) -> (sums of the metrics, labels, predicted, confidence, each [B])."""
    model, recipe = experiment.model, experiment.recipe

    def step(variables: Any, arrays: Any, batch: Any, counts: jax.Array) -> Any:
        images, labels = stream.take(arrays, batch)
        logits = predict(model, recipe, variables, images)
        predicted, confidence = jnp.argmax(logits, -1), jnp.max(jax.nn.softmax(logits), -1)
        return jax.lax.psum(metrics.sums(logits, labels, counts), "data"), labels, predicted, confidence

    each = P("data")
    spread = jax.shard_map(
        step, mesh=experiment.mesh, in_specs=(P(), P(), each, each), out_specs=(P(), each, each, each), check_vma=False
    )
    return jax.jit(spread, compiler_options=compiler_options(experiment.platform, experiment.mesh))
