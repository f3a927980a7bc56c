"""One of two hosts that stream a set of 40 examples; prints what it read and the batches that both made together.

python streaming_host.py HOST:PORT PROCESS_ID
"""

import io
import json
import sys

import PIL.Image


class Numbers:
    """Examples that carry their row: label and every pixel are the row's number. Some may be broken."""

    image_shape = (8, 8, 3)
    class_names = tuple(map(str, range(250)))

    def __init__(self, count, broken=()):
        self._count, self._broken, self.read = count, set(broken), []

    def __len__(self):
        return self._count

    def __getitem__(self, row):
        self.read.append(row)
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (row, row, row)).save(file, "PNG")
        return (file.getvalue()[:20] if row in self._broken else file.getvalue()), row

    def name(self, row):
        return f"example {row}"


def main(coordinator, process_id):
    import jax
    from jax.experimental import multihost_utils

    from resattn_jax.data.streaming import Streaming
    from resattn_jax.data.transforms import EvalTransform, TrainTransform
    from resattn_jax.runtime import initialize, make_mesh

    initialize(coordinator, 2, int(process_id))
    mesh = make_mesh()
    source = Numbers(40)
    train = Streaming(source, mesh, TrainTransform(8, False, (0.08, 1), (0.75, 1.33), (0, 0)), 0, False)

    def together(x):
        return multihost_utils.process_allgather(x, tiled=True)

    def first_pixel(images):
        return jax.jit(lambda x: x[..., 0, 0, 0])(images)

    # An epoch of 40 examples, the second.
    steps = [train.train_batches(3, step, 1, 10, 1) for step in range(4, 8)]
    train.close()
    said = {
        "read": source.read,
        "labels": [together(b["label"])[0].tolist() for b in steps],
        "pixels": [together(first_pixel(b["image"]))[0].tolist() for b in steps],
    }
    test = Streaming(Numbers(23), mesh, EvalTransform(8, 1.0, 1), 0, False)
    measured = [(together(first_pixel(b["image"])), together(mask)) for b, mask in test.eval_batches(10, None)]
    said["measured"] = [int(x) for pixels, mask in measured for x in pixels[mask]]
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
