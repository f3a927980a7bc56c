"""tensorboardX without PyTorch and the clients of buckets.

Its head imports them where they are installed: seconds of every start, for what nothing here uses.
"""

from __future__ import annotations

import sys

# None: importing it is an ImportError, which tensorboardX expects. What is imported already stays.
_left_out = [name for name in ("torch", "google.cloud.storage", "boto3") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_left_out))  # type: ignore[arg-type]
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    for _name in _left_out:
        del sys.modules[_name]

__all__ = ["Event", "EventsWriter", "SessionLog", "summary"]
