"""Train and evaluate Residual Attention Networks. `python -m resattn_jax` is the same where the package is installed.

python main.py [--config=NAME or FILE] [--mode=train|evaluate|show_data|…] [--workdir=DIR] [--config.key=value ...]
"""

import sys

from resattn_jax.__main__ import main, program

__all__ = ["main", "program"]

if __name__ == "__main__":
    sys.exit(program())
