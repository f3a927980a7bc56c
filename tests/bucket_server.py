"""A bucket on this machine: gcp-storage-emulator, with what it lacks of Cloud Storage and the code under test asks for.

That is generations: a reader is told which one it has read, and a writer may say which one it means to replace, 0 for
none (ifGenerationMatch).
"""

import contextlib
import functools
import http.server
import os
import threading
import urllib.parse
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Mismatch(Exception):
    """The object is of another generation than was to be replaced."""


class Objects(Storage):
    """on_write: called with the name of each object before it is written; what it raises ends the request."""

    def __init__(self):
        super().__init__(use_memory_fs=True)
        self.on_write, self.request = lambda name: None, threading.local()  # request: of the thread that serves it
        self.one_at_a_time = threading.RLock()

    def create_file(self, bucket, name, *arguments):
        with self.one_at_a_time:
            if self.request.replaces not in (None, self.generation(name)):
                raise Mismatch
            self.on_write(name)
            super().create_file(bucket, name, *arguments)

    def read(self, name):
        """What an object holds, or None."""
        with contextlib.suppress(NotFound):
            return self.get_file(BUCKET, name)

    def generation(self, name):
        try:
            return self.get_file_obj(BUCKET, name)["generation"]
        except NotFound:
            return "0"

    def names(self, folder):
        """Of all objects in a folder, from there."""
        found = (item["name"] for item in self.get_file_list(BUCKET, f"{folder}/", None)[0])
        return sorted(name.removeprefix(f"{folder}/") for name in found)


class Handler(RequestHandler):
    wbufsize = 1 << 16  # an answer in one packet

    def do_POST(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        self.storage.request.replaces = query.get("ifGenerationMatch", [None])[0]
        try:
            super().do_POST()
        except Mismatch:
            self.send_error(HTTPStatus.PRECONDITION_FAILED)

    def do_PUT(self):
        self.storage.request.replaces = None
        super().do_PUT()

    def do_GET(self):
        with self.storage.one_at_a_time:
            super().do_GET()

    def end_headers(self):
        address = urllib.parse.urlparse(self.path)
        if self.command == "GET" and "alt=media" in address.query:
            name = urllib.parse.unquote(address.path.partition(f"/b/{BUCKET}/o/")[2])
            self.send_header("x-goog-generation", self.storage.generation(name))
        super().end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # TensorStore opens many connections at once

    def handle_error(self, request, client_address):
        """A client that closes a connection early is none; the others see that theirs is closed."""


@contextlib.contextmanager
def running():
    """The objects of a bucket, to which gcsfs and TensorStore of this process, and of those it starts, then turn."""
    objects = Objects()
    create_bucket(BUCKET, objects)
    server = Server(("localhost", 0), functools.partial(Handler, objects))
    address = f"http://localhost:{server.server_port}"
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = address
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"  # TensorStore's
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # the emulator has no gRPC to ask for the bucket's kind
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
