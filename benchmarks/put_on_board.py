"""Makes a net on board of a run: its newest weights in float16, measured again as they then are, with a model card.

    python -m benchmarks.put_on_board --workdir=runs/digits --command='python main.py --config=configs/digits.py'

It writes resattn_jax/weights/DATA/NET. --command is what made the run; the card repeats it.
"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np

from resattn_jax import load, on_board
from resattn_jax.checkpoint import Reader
from resattn_jax.export.folder import WEIGHTS, write_folder
from resattn_jax.export.portable import TrainedNet
from resattn_jax.models.count import count_parameters
from resattn_jax.run import Run

CARD = """# {name}

`{net}`, a residual attention network (Wang et al., CVPR 2017) of {parameters:,} parameters, trained on `{data}`:
{classes:,} classes, images of {shape}.

    {command}

Seed {seed}, {steps:,} steps; the weights are those of the last. They lie here in float16 and are computed with in
float32. So they have a top-1 accuracy of **{top1:.2%}** and a loss of {loss:.4f} on the {examples:,} images of the
split `{split}`, which they were not trained on.

```python
import resattn_jax

net = resattn_jax.load("{name}")
net.top(images)  # paths, PIL images or arrays
```

It knows these classes and no others: whatever it is shown, it names one of them. Apache-2.0, as the code.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--command", required=True)
    args = parser.parse_args()
    trained = load(args.workdir, "newest")
    with Reader(Run(args.workdir).checkpoints) as checkpoints:
        steps = checkpoints.find("newest")[0]
    config = trained.config
    name = f"{config.data.name}/{config.model.name}"
    folder = Run(on_board.FOLDER / name)
    taken = TrainedNet(
        config=config, spec=trained.spec, variables=jax.device_get(trained.variables), step=steps, metrics={}
    )
    write_folder(folder, taken, dtype=np.float16)
    net = load(folder.path)
    final = {key: value for key, value in net.evaluate().items() if key in ("top1", "top5", "loss", "examples")}
    folder.write("result.json", json.dumps({"step": steps, "command": args.command, "final": final}, indent=2) + "\n")
    card = CARD.format(
        name=name,
        net=config.model.name,
        parameters=count_parameters(net.variables["params"]),
        data=config.data.name,
        classes=net.spec.num_classes,
        shape="x".join(map(str, net.spec.image_shape)),
        command=args.command,
        seed=config.seed,
        steps=steps,
        split=config.data.eval_split,
        **final,
    )
    folder.write("README.md", card)
    print(f"{name}: {(folder.path / WEIGHTS).stat().length:,} bytes, top-1 {final['top1']:.2%}; {folder}")


if __name__ == "__main__":
    main()
