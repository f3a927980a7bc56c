"""A trained net as a folder of its own, for this package and for others. Importing this imports nothing."""

# The formats a net is written in, and the file of each; the first is what `resattn_jax.load` opens, always written.
FILES = {
    "safetensors": "model.safetensors",
    "torch": "model.pth",
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
}
