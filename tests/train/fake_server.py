"""An OpenAI-compatible server on loopback that answers by rote and misbehaves as told."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Action = str | tuple[int, dict[str, str]]  # "ok", "tear", "garbage", "odd", "hang", or a status with headers


def answer_to(messages: list[dict]) -> str:
    return f"{len(messages)}: {messages[-1]['content']}"


class FakeServer:
    """act(number of the request, its body) says what happens. `bodies` holds all chat requests, answered or not."""

    def __init__(
        self, act: Callable[[int, dict], Action] = lambda number, body: "ok", models: tuple[str, ...] = ("m",)
    ):
        self.act, self.models, self.bodies, self.answered = act, models, [], 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and content in one packet

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, json.dumps({"data": [{"id": name} for name in fake.models]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    action = fake.act(len(fake.bodies), body)
                if action == "hang":
                    fake.closing.wait()
                    action = "tear"
                if action == "tear":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                elif action == "garbage":
                    self.reply(200, b"<html>")
                elif action == "odd":
                    self.reply(200, b'{"choices": []}')
                elif isinstance(action, tuple):
                    self.reply(action[0], b'{"error": "as told"}', action[1])
                else:
                    with fake.lock:
                        fake.answered += 1
                    message = {"role": "assistant", "content": answer_to(body["messages"])}
                    choice = {"message": message, "finish_reason": "stop"}
                    self.reply(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7}}).encode())

            def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that hang up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
