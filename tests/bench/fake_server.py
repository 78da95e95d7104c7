"""A server that speaks just enough of the OpenAI API to be measured, as a program of its own.

The last message says how it behaves: `status N` answers with that status, `error` breaks the
stream off with an error event, `garbage` with something that is not JSON, `hang` never answers,
`late` waits before the first token, anything else streams the words of the message.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LATE_S = 0.4


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if text.startswith("status "):
            self.send_response(int(text.split()[1]))
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        self.wfile.write(b": ping\n\n")
        if text == "hang":
            time.sleep(60)
        if text == "late":
            time.sleep(LATE_S)
        words = (text.split() * body["max_tokens"])[: body["max_tokens"]]
        for word in words:
            self.event({"choices": [{"delta": {"content": f"{word} "}}]})
        if text == "error":
            self.event({"error": {"message": "out of memory", "type": "server_error"}})
            return
        if text == "garbage":
            self.wfile.write(b"data: {oops\n\n")
            return
        self.event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "prompt_tokens_details": {"cached_tokens": 3}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, document: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--fail", action="store_true", help="end with an error")
    parser.add_argument("--hold", type=int, help="start a process that holds so many bytes")
    options, _ = parser.parse_known_args()
    if options.fail:
        sys.exit("no such model")
    if options.hold:
        subprocess.Popen([sys.executable, "-c", f"import time; held = b'x' * {options.hold}; time.sleep(60)"])
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
