"""A server of the S3 protocol on this machine, whose requests a test can watch, refuse, or answer by ending a job."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug import Response
from werkzeug.serving import WSGIRequestHandler, make_server

from raydpp.storage import Folder, resolve

BUCKET = "bucket"


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


class ObjectStore:
    """A running server with one bucket, which is private.

    Attributes:
        refuse: An HTTP status, the code of an error, and headers: the answer to every request; None lets all through.
        seen: The requests so far, "METHOD /bucket/key?query".
    """

    def __init__(self) -> None:
        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self._events: list[tuple[re.Pattern[str], int, Callable[[], object]]] = []
        self._lock = threading.Lock()
        self.refuse: tuple[int, str, dict[str, str]] | None = None
        self.seen: list[str] = []
        self.start()
        resolve(self.url("", more="&allow_bucket_creation=true"))[0].create_dir(BUCKET)

    def url(self, name: str, bucket: str = BUCKET, more: str = "") -> str:
        """The URL of a name in a bucket."""
        return f"s3://{bucket}/{name}?endpoint_override=127.0.0.1:{self._port}&scheme=http{more}"

    def folder(self, name: str) -> Folder:
        return Folder.at(self.url(name))

    def at(self, pattern: str, count: int, act: Callable[[], object]) -> None:
        """Before the ``count``-th request from now on that matches is answered, ``act``; it then fails."""
        self._events.append((re.compile(pattern), count, act))

    def start(self) -> None:
        """Answer at the same port as before."""
        self._server = make_server("127.0.0.1", self._port, self, threaded=True, request_handler=_Quiet)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections; what is stored stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = environ["QUERY_STRING"]
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' * bool(query)}{query}"
        answer = self.refuse
        if "HTTP_AUTHORIZATION" not in environ:
            answer = (403, "AccessDenied", {})
        with self._lock:
            self.seen.append(request)
            for event in list(self._events):
                pattern, count, act = event
                if pattern.search(request):
                    self._events.remove(event)
                    if count > 1:
                        self._events.append((pattern, count - 1, act))
                    else:
                        act()
                        answer = (503, "ServiceUnavailable", {})
        if answer is None:
            found: Iterable[bytes] = self._moto(environ, start_response)
            return found
        status, code, headers = answer
        body = "" if request.startswith("HEAD") else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return Response(body, status, headers, mimetype="application/xml")(environ, start_response)
