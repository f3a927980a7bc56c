"""One of two hosts that stream a set of 40 examples; prints what it read and the batches that both made together.

python streaming_host.py HOST:PORT PROCESS_ID
"""

import json
import sys


def main(coordinator, process_id):
    import jax
    from helpers import Numbers
    from jax.experimental import multihost_utils

    from resattn_jax.data.streaming import Reading, StreamingEval, StreamingTrain
    from resattn_jax.data.transforms import EvalTransform, TrainTransform
    from resattn_jax.runtime import initialize, make_mesh

    initialize(coordinator, 2, int(process_id))
    mesh = make_mesh()
    source = Numbers(40)
    reading = Reading(workers=0, skip_broken=False, shares_host_memory=True, mesh=mesh)
    transform = TrainTransform(8, False, (0.08, 1), (0.75, 1.33), (0, 0))
    train = StreamingTrain(source, transform, reading, seed=3, batch_size=10)

    def together(x):
        return multihost_utils.process_allgather(x, tiled=True)

    def first_pixel(images):
        return jax.jit(lambda x: x[..., 0, 0, 0])(images)

    # An epoch of 40 examples, the second.
    steps = [train.batches(step, 1) for step in range(4, 8)]
    train.close()
    said = {
        "read": source.read,
        "labels": [together(b["label"])[0].tolist() for b in steps],
        "pixels": [together(first_pixel(b["image"]))[0].tolist() for b in steps],
    }
    test = StreamingEval(Numbers(23), EvalTransform(8, 1.0, 1), reading, batch_size=10, max_examples=None)
    measured = [(together(first_pixel(b["image"])), together(mask)) for b, mask in test]
    said["measured"] = [int(x) for pixels, mask in measured for x in pixels[mask]]
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
