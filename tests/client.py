"""What the Python parts of the tests say to a server, with the standard library alone."""

import json
import sys
import time
import urllib.error
import urllib.request

# A job of a test that takes longer hangs.
PATIENCE_SECONDS = 300


class Client:
    def __init__(self, url: str, key: str):
        self.url, self.key = url, key

    def send(self, path: str, body: bytes | None = None, content_type: str = "application/json"):
        """The open answer; an error of HTTP's is raised as urllib does."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": content_type}
        return urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/{path}", body, headers), timeout=120)

    def call(self, path: str, body=None):
        """Posts the body, or without one gets what is there."""
        with self.send(path, None if body is None else json.dumps(body).encode()) as answer:
            return json.load(answer)

    def form(self, path: str, name: str, content: bytes, **fields: str) -> dict:
        """Posts a multipart form with one file."""
        edge = "lathe-test-form"
        parts = [f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()]
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="rows.jsonl"\r\n'
        parts += [f"{head}Content-Type: application/octet-stream\r\n\r\n".encode(), content, f"\r\n--{edge}--\r\n".encode()]
        with self.send(path, b"".join(parts), f"multipart/form-data; boundary={edge}") as answer:
            return json.load(answer)

    def ended(self, path: str, states: tuple[str, ...], every: float = 0.05) -> dict:
        """What is at `path`, once its state is one of these; it is asked for so often, in seconds."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (found := self.call(path))["state"] not in states:
            if found["state"] == "failed" or time.monotonic() > until:
                sys.exit(f"{path} is {found['state']}: {found.get('error')}")
            time.sleep(every)
        return found
