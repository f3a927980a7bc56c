import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
INIT = (HERE / "resattn_jax/__init__.py").read_text(encoding="utf-8")
NOTEBOOK = ["ipykernel", "nbclient"]

setup(
    name="resattn_jax",
    version=re.search(r'__version__ = "(.*)"', INIT)[1],
    description="Residual Attention Networks (Wang et al., CVPR 2017) in JAX and Flax, for TPU and GPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["resattn_jax", "resattn_jax.*"]),
    package_data={"resattn_jax": ["py.typed", "data/sources/*.npz", "report/templates/*.html", "weights/**"]},
    entry_points={"console_scripts": ["resattn_jax = resattn_jax.__main__:program"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array-record",
        "clu>=0.0.12",
        "etils[epath]",
        "flatbuffers",  # jax.export writes with it and does not ask for it
        "flax>=0.12",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "grain>=0.2.18",
        "jax>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "ml-collections>=1.1",
        "numpy>=2",
        "opencv-python-headless",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.3",  # AtomicityOptions
        "pillow",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-learn",
        "simplejpeg>=1.9",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda13": ["jax[cuda13]"],
        "gcs": ["etils[epath-gcs]"],  # workdirs in a bucket
        "prepare": ["tensorflow-cpu>=2.21"],  # TFDS needs TensorFlow to prepare a set, not to read one
        "torch": ["torch>=2.13"],
        "onnx": ["onnx>=1.20"],
        "wandb": ["wandb>=0.19"],  # config.tracker
        "notebook": NOTEBOOK,
        "test": [
            "etils[epath-gcs]",
            "gcp-storage-emulator",
            "markdown-it-py",
            "onnx>=1.20",
            "onnxruntime>=1.20",
            "psutil",
            "pytest",
            "pytest-xdist",
            "wandb>=0.19",
            *NOTEBOOK,
        ],
        "lint": ["mypy", "ruff"],
        "package": ["build"],
    },
)
