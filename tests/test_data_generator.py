"""Generators under stress: kill -9 at random moments, full disks, servers that misbehave, and a real one that does not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest

from realign_core.data import generator as module
from realign_core.data.generator import Endpoint, EndpointError, PolicyGenerator, Reply, Request, produce
from realign_core.errors import BackendError, DataError, ModelError, OutputError, ReAlignError

REQUESTS = [Request(f"r{i:03}", f"question {i}", n=1 + i % 3, extra={"part": i % 4}) for i in range(90)]
SETTINGS = {"chunk": 4, "seed": 3, "progress": False}


class Toy:
    name = "toy"

    def reply(self, requests, seed=0):
        return [Reply(r.key, tuple(f"{r.prompt} {random.Random(f'{seed} {r.key} {i}').random()}" for i in range(r.n)),
                      tuple(-float(i) for i in range(r.n)), (True,) * r.n, self.name) for r in requests]


# ---- killed and restarted

def slow_write(handle, data, at, pause=0.002):
    "Writes a few bytes at a time, so that a kill lands inside a line."
    for start in range(0, len(data), 90):
        os.pwrite(handle, data[start : start + 90], at + start)
        time.sleep(pause)
    os.fsync(handle)


def killed_after(seconds, work):
    "Run `work` in a process of its own and kill it with signal 9; True when it had finished before."
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write", slow_write)
    began = time.monotonic()
    whole = produce(REQUESTS, Toy(), tmp_path / "whole.jsonl", **SETTINGS)
    took = time.monotonic() - began
    path, rng, torn, sizes = tmp_path / "killed.jsonl", random.Random(5), 0, []
    for _ in range(10):
        assert not killed_after(took * rng.uniform(0.02, 0.1), lambda: produce(REQUESTS, Toy(), path, **SETTINGS))
        data = path.read_bytes() if path.exists() else b""
        torn += bool(data) and not data.endswith(b"\n")
        sizes.append(len(data))
    monkeypatch.undo()
    assert torn and max(sizes) < len(whole.path.read_bytes()), "the kills must land in the middle"
    resumed = produce(REQUESTS, Toy(), path, **SETTINGS)
    assert path.read_bytes() == whole.path.read_bytes() and list(resumed) == list(whole)
    assert resumed.counts["of which from an earlier run"] > 0
    journals = [p.with_name(p.name + ".journal").read_bytes() for p in (path, whole.path)]
    assert journals[0] == journals[1]


@pytest.mark.seconds(10)
def test_the_shipped_model_killed_and_restarted(tmp_path):
    from realign_core import load
    from realign_core.tinyworld import World
    generator = PolicyGenerator(load("tinyworld-instruct", "torch"))
    requests = [Request(f"q{i}", row["prompt"], n=2, max_tokens=24) for i, row in enumerate(World().rows("facts", 48))]
    settings = {"chunk": 4, "seed": 1, "progress": False}
    began = time.monotonic()
    whole = produce(requests, generator, tmp_path / "whole.jsonl", **settings)
    took = time.monotonic() - began
    path, rng = tmp_path / "killed.jsonl", random.Random(2)
    for _ in range(3):
        killed_after(took * rng.uniform(0.15, 0.4), lambda: produce(requests, generator, path, **settings))
    produce(requests, generator, path, **settings)
    assert path.read_bytes() == whole.path.read_bytes()
    assert len({(row["key"], row["sample"]) for row in whole}) == 96


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_any_cut_of_the_journal_is_mended(tmp_path, cut):
    whole = produce(REQUESTS[:12], Toy(), tmp_path / "a.jsonl", **SETTINGS)
    bytes_, side = whole.path.read_bytes(), tmp_path / "a.jsonl.journal"
    journal = side.read_bytes()
    head = len(journal.split(b"\n")[0]) + 1
    side.write_bytes(journal[: head + cut])
    produce(REQUESTS[:12], Toy(), whole.path, **SETTINGS)
    assert whole.path.read_bytes() == bytes_ and side.read_bytes() == journal


def test_a_file_cut_short_or_deleted_is_made_again(tmp_path):
    whole = produce(REQUESTS, Toy(), tmp_path / "a.jsonl", **SETTINGS)
    data = whole.path.read_bytes()
    whole.path.write_bytes(data[: len(data) // 2])
    assert 30 < produce(REQUESTS, Toy(), whole.path, **SETTINGS).counts["of which from an earlier run"] < 60
    assert whole.path.read_bytes() == data
    whole.path.unlink()
    produce(REQUESTS, Toy(), whole.path, **SETTINGS)
    assert whole.path.read_bytes() == data


def test_a_finished_file_is_read_not_made_again(tmp_path):
    first = produce(REQUESTS, Toy(), tmp_path / "a.jsonl", **SETTINGS)

    class Silent(Toy):
        def reply(self, requests, seed=0): raise AssertionError("asked again")

    again = produce(iter(REQUESTS), Silent(), first.path, **SETTINGS)
    assert list(again) == list(first) == list(produce(REQUESTS, Toy(), **SETTINGS))


# ---- refusals

class Other(Toy):
    name = "other"


class Probed(Toy):
    def __init__(self, value): self.value = value
    def probe(self): return [self.value, 1.0]


def other_rows(request, reply): return []


@pytest.mark.parametrize("change, named", [
    (dict(requests=REQUESTS[:-1]), "requests"), (dict(generator=Other()), "generator"), (dict(seed=4), "seed"),
    (dict(chunk=8), "chunk size"), (dict(rows=other_rows), "rows function"), (dict(generator=Probed(0.5)), "weights"),
    (dict(requests=[*REQUESTS[:-1], Request("r089", "question 89", n=3, temperature=0.5, extra={"part": 1})]), "requests")])
def test_it_refuses_to_go_on_with_anything_else(tmp_path, change, named):
    path = produce(REQUESTS, Probed(0.25) if named == "weights" else Toy(), tmp_path / "a.jsonl", **SETTINGS).path
    before = path.read_bytes()
    settings = {"requests": REQUESTS, "generator": Toy(), "out": path, **SETTINGS, **change}
    with pytest.raises(OutputError, match=named):
        produce(**settings)
    assert path.read_bytes() == before


def test_a_probe_may_differ_by_rounding(tmp_path):
    first = produce(REQUESTS, Probed(0.25), tmp_path / "a.jsonl", **SETTINGS)
    assert list(produce(REQUESTS, Probed(0.2503), first.path, **SETTINGS)) == list(first)


def test_two_sets_of_weights_have_two_probes(backend):
    from realign_core import load
    base, instruct, again = (PolicyGenerator(load(f"tinyworld-{name}", backend)) for name in ("base", "instruct", "instruct"))
    assert instruct.probe() == again.probe()
    assert module._differs({"probe": base.probe()}, {"probe": instruct.probe()}) == ["generator's weights"]


@pytest.mark.parametrize("content", [b'{"mine": 1}\n', b"x"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(OutputError, match="no journal"):
        produce(REQUESTS, Toy(), tmp_path / "a.jsonl", **SETTINGS)
    assert (tmp_path / "a.jsonl").read_bytes() == content


def test_an_edited_file_is_refused(tmp_path):
    path = produce(REQUESTS, Toy(), tmp_path / "a.jsonl", **SETTINGS).path
    path.write_bytes(path.read_bytes().replace(b"question 50", b"question XX"))
    with pytest.raises(OutputError, match="changed since"):
        produce(REQUESTS, Toy(), path, **SETTINGS)


def test_one_process_at_a_time(tmp_path):
    class Nested(Toy):
        def reply(self, requests, seed=0):
            with pytest.raises(OutputError, match="another process"):
                produce(REQUESTS, Toy(), tmp_path / "a.jsonl", **SETTINGS)
            return super().reply(requests, seed)

    assert len(produce(REQUESTS[:4], Nested(), tmp_path / "a.jsonl", **SETTINGS)) == 7


# ---- disks

def test_a_full_disk_leaves_whole_chunks(tmp_path):
    whole = produce(REQUESTS, Toy(), tmp_path / "whole.jsonl", **SETTINGS).path.read_bytes()
    path, before = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
        with pytest.raises(OutputError, match="cannot be written"):
            produce(REQUESTS, Toy(), path, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    data, side = path.read_bytes(), (tmp_path / "a.jsonl.journal").read_text().splitlines()
    assert whole.startswith(data) and data.endswith(b"\n") and len(data) > len(whole) // 3
    assert json.loads(side[-1])["end"] == len(data)
    produce(REQUESTS, Toy(), path, **SETTINGS)
    assert path.read_bytes() == whole


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "file" / "a.jsonl", tmp_path / "folder.jsonl", tmp_path / "a.json", "/proc/a.jsonl"):
        with pytest.raises(OutputError):
            produce(REQUESTS, Toy(), path, **SETTINGS)


# ---- what callers and generators get wrong

@pytest.mark.parametrize("bad", [dict(key=""), dict(key=3), dict(prompt=None), dict(prompt=[]), dict(prompt=[{"content": "x"}]),
                                 dict(n=0), dict(n=True), dict(temperature=float("nan")), dict(temperature=-0.1), dict(top_p=0),
                                 dict(top_p=1.5), dict(max_tokens=0), dict(extra=None)])
def test_requests_that_make_no_sense(bad):
    with pytest.raises(DataError, match=next(iter(bad))):
        Request(**{"key": "a", "prompt": "b", **bad})


def test_keys_twice_and_extras_that_are_not_json():
    with pytest.raises(DataError, match="same key"):
        produce([REQUESTS[0], REQUESTS[0]], Toy())
    with pytest.raises(DataError, match="JSON"):
        produce([Request("a", "b", extra={"x": {1, 2}})], Toy())
    with pytest.raises(DataError, match="written anyway"):
        produce([Request("a", "b", extra={"prompt": "c"})], Toy(), progress=False)
    assert produce([Request("a", "b", extra={"prompt": "b"})], Toy(), progress=False)[0]["prompt"] == "b"


def test_odd_text_survives(tmp_path):
    odd = ["\ud83d", "a\x85b\u2028c\x0b\x00", "\r\n", "日本語", "x" * 100_000]

    class Odd(Toy):
        def reply(self, requests, seed=0): return [Reply(r.key, (odd[int(r.key)],), None, (False,), "odd") for r in requests]

    requests = [Request(str(i), "?") for i in range(len(odd))]
    made = produce(requests, Odd(), tmp_path / "a.jsonl", chunk=2, progress=False)
    assert [row["completion"] for row in made] == odd
    assert list(produce(requests, Odd(), tmp_path / "a.jsonl", chunk=2, progress=False)) == list(made)
    assert "logp" not in made[0] and made[0]["finished"] is False


@pytest.mark.parametrize("rows", [lambda a, b: [{"x": float("nan")}], lambda a, b: [{"x": object()}], lambda a, b: ["text"],
                                  lambda a, b: 1 / 0, lambda a, b: None])
def test_rows_that_fail_name_the_request(tmp_path, rows):
    with pytest.raises(DataError, match="request 'r000'"):
        produce(REQUESTS, Toy(), tmp_path / "a.jsonl", rows=rows, **SETTINGS)
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.parametrize("spoil", [lambda replies: replies[:-1], lambda replies: replies[::-1],
                                   lambda replies: [Reply(r.key, r.texts[:-1], None, r.finished, "x") for r in replies],
                                   lambda replies: [Reply(r.key, r.texts, (0.0,) * 9, r.finished, "x") for r in replies]])
def test_a_generator_that_leaves_something_out(spoil):
    class Forgetful(Toy):
        def reply(self, requests, seed=0): return spoil(super().reply(requests, seed))

    with pytest.raises(ReAlignError, match="toy"):
        produce(REQUESTS, Forgetful(), **SETTINGS)


def test_rows_may_be_none_and_messages_stay_messages(tmp_path):
    made = produce(REQUESTS, Toy(), tmp_path / "a.jsonl", rows=lambda a, b: [{"k": a.key}] if a.key > "r080" else [], **SETTINGS)
    assert [row["k"] for row in made] == [r.key for r in REQUESTS if r.key > "r080"]
    messages = [{"role": "user", "content": "hi"}]
    row = produce([Request("a", messages)], Toy(), progress=False)[0]
    assert row["prompt"] == messages and row["completion"][0]["role"] == "assistant"
    assert len(produce([], Toy(), tmp_path / "none.jsonl", progress=False)) == 0


def test_a_prompt_without_room_is_an_error_that_names_it():
    from realign_core import load
    generator = PolicyGenerator(load("tinyworld-instruct", "torch"))
    for request in (Request("long", "nuts " * 300), Request("long", "nuts", max_tokens=256)):
        with pytest.raises(DataError, match="'long'"):
            generator.reply([request])


def test_a_policy_mixes_settings_in_order(backend):
    from realign_core import load
    generator = PolicyGenerator(load("tinyworld-instruct", backend))
    requests = [Request(str(i), f"What is {i + 11} + 5?", n=1 + i % 2, temperature=float(i % 3), max_tokens=8 + i % 2)
                for i in range(7)]
    replies = generator.reply(requests, seed=4)
    assert replies == generator.reply(requests, seed=4) and [len(r.texts) for r in replies] == [r.n for r in requests]
    greedy = [r for r in requests if r.temperature == 0]
    cold = [reply.texts for reply, request in zip(replies, requests, strict=True) if request.temperature == 0]
    assert [r.texts for r in generator.reply(greedy)] == cold
    assert all(logp <= 0 for r in replies for logp in r.logps)


# ---- endpoints

def completion(text="fine", reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


class Scripted(BaseHTTPRequestHandler):
    "Plays the server's script: one (status, body, headers) per question; the last one is repeated."

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            step = server.script[min(len(server.seen), len(server.script) - 1)]
            server.seen.append((body, self.headers.get("Authorization")))
        status, text, headers = (*step, {})[:3]
        if status == "slow":
            time.sleep(1.0)
            status = 200
        if status == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{\"choi")
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError):
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args): pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(module, "_pause", lambda *args: 0.01)
    servers = []

    def start(*script, **settings):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.script, server.seen, server.lock = script, [], threading.Lock()
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        settings = {"api_key": "sk-secret-123", "timeout": 5, "retries": 3, **settings}
        return server, Endpoint("m", f"http://127.0.0.1:{server.server_port}/v1", **settings)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


FINE = (200, completion())
BUSY = (429, '{"error": {"message": "slow down"}}')


@pytest.mark.parametrize("trouble", [BUSY, (500, "{}"), (503, "not json"), ("cut", ""), (200, "{not json"),
                                     (200, '{"choices": []}'), (200, "<html>", {"Content-Type": "text/html"}), (200, "[]"),
                                     (200, "null"), (408, "{}")])
def test_trouble_that_passes_is_waited_out(serve, trouble):
    server, endpoint = serve(trouble, trouble, FINE)
    assert endpoint.reply([Request("a", "hello")])[0] == Reply("a", ("fine",), None, (True,), endpoint.name)
    assert len(server.seen) == 3


@pytest.mark.parametrize("trouble", [BUSY, (500, "{}"), ("cut", ""), (200, "{not json"), (200, '{"choices": null}')])
def test_trouble_that_stays_is_a_typed_error(serve, tmp_path, trouble):
    server, endpoint = serve(*[FINE] * 8, trouble, workers=1)
    with pytest.raises(EndpointError, match="m at 127.0.0.1.*attempt 4"):
        produce([Request(str(i), "hello") for i in range(20)], endpoint, tmp_path / "a.jsonl", chunk=4, progress=False)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 8
    server.script = [FINE]
    made = produce([Request(str(i), "hello") for i in range(20)], endpoint, tmp_path / "a.jsonl", chunk=4, progress=False)
    assert [row["key"] for row in made] == [str(i) for i in range(20)]


@pytest.mark.parametrize("status, body", [(401, '{"error": {"message": "bad key sk-secret-123"}}'), (403, "{}"),
                                          (404, "no model"), (400, "{}"), (429, '{"error": {"code": "insufficient_quota"}}')])
def test_a_wrong_key_or_model_is_an_error_at_once(serve, status, body):
    server, endpoint = serve((status, body), workers=1)
    with pytest.raises(EndpointError, match=f"{status}") as caught:
        endpoint.reply([Request(str(i), "hello") for i in range(30)])
    assert "sk-secret" not in str(caught.value) and len(server.seen) <= 2


def test_a_slow_server_times_out_and_is_asked_again(serve):
    server, endpoint = serve(("slow", completion("late")), FINE, timeout=0.3)
    assert endpoint.reply([Request("a", "hello")])[0].texts == ("fine",)
    assert len(server.seen) == 2


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint("m", f"http://127.0.0.1:{port}/v1", retries=0)
    with pytest.raises(EndpointError, match=f"m at 127.0.0.1:{port}.*APIConnectionError"):
        endpoint.reply([Request("a", "hello")])


def test_requests_run_together_and_keep_their_order(serve):
    server, endpoint = serve(("slow", completion()), workers=8)
    began = time.monotonic()
    settings = {"n": 2, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    replies = endpoint.reply([Request(str(i), f"hello {i}", **settings) for i in range(4)], seed=1)
    assert time.monotonic() - began < 4
    assert [r.key for r in replies] == list("0123") and all(len(r.texts) == 2 for r in replies)
    bodies = [body for body, _ in server.seen]
    assert len({body["seed"] for body in bodies}) == 8 and bodies[0]["max_tokens"] == 7 and bodies[0]["top_p"] == 0.9


def test_what_a_message_may_look_like(serve):
    kept_apart = {"role": "assistant", "content": "It is 5.", "reasoning_content": "2+3=5"}
    def body(message, reason): return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]})
    script = [(200, body(kept_apart, "stop")), (200, body({"role": "assistant", "content": None}, "length"))]
    _, endpoint = serve(*script, workers=1)
    replies = endpoint.reply([Request("a", "2+3?"), Request("b", [{"role": "user", "content": "?"}])])
    assert [r.texts[0] for r in replies] == ["<think>2+3=5</think>It is 5.", ""]
    assert [r.finished[0] for r in replies] == [True, False]


def test_the_key_is_sent_and_shown_nowhere(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    server, endpoint = serve(FINE, api_key=None)
    made = produce([Request("a", "hello")], endpoint, tmp_path / "a.jsonl", progress=False)
    assert server.seen[0][1] == "Bearer sk-from-environment"
    written = b"".join(p.read_bytes() for p in tmp_path.iterdir()).decode()
    for text in (written, repr(endpoint), str(vars(endpoint)), repr(made), made._repr_markdown_(), endpoint.name):
        assert "sk-from-environment" not in text
    assert "pass" not in Endpoint("m", "http://user:pass@127.0.0.1:1/v1").name


def test_settings_that_cannot_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        Endpoint("m")
    for url in ("127.0.0.1:80", "ftp://x/v1", "http://"):
        with pytest.raises(ModelError, match="base_url"):
            Endpoint("m", url)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BackendError, match=r"realign_core\[endpoint\]"):
        Endpoint("m", "http://127.0.0.1:1/v1")


def test_the_pause_grows_and_obeys_the_server():
    class Told(Exception):
        response = type("R", (), {"headers": {"retry-after": "7"}})()

    rng = random.Random(0)
    first, sixth = ([module._pause(k, ValueError(), rng) for _ in range(200)] for k in (1, 6))
    assert 0.25 <= min(first) < max(first) <= 0.75 and 8 <= min(sixth) < max(sixth) <= 24
    assert module._pause(1, Told(), rng) == 7 and module._pause(30, ValueError(), rng) == 60


@pytest.mark.seconds(25)
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
def test_a_real_server_answers_as_the_policy_does(root, tmp_path):
    from realign_core import load
    from realign_core.tinyworld import World
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", "realign_core/tinyworld/instruct", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        policy, world = PolicyGenerator(load("tinyworld-instruct", "torch")), World()
        kinds = ("facts", "arithmetic", "forbidden", "code")
        requests = [Request(f"{kind}{i}", row["prompt"], temperature=0.0, max_tokens=48)
                    for kind in kinds for i, row in enumerate(world.rows(kind, 3, "heldout"))]
        own = policy.reply(requests)
        for _ in range(300):
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            assert server.poll() is None, (tmp_path / "log").read_text()[-500:]
            time.sleep(0.2)
        endpoint = Endpoint("default_model", f"http://127.0.0.1:{port}/v1", retries=1)
        remote = produce(requests, endpoint, tmp_path / "a.jsonl", chunk=5, progress=False)
        assert [row["completion"] for row in remote] == [r.texts[0] for r in own]
        assert [row["finished"] for row in remote] == [r.finished[0] for r in own]
        with pytest.raises(EndpointError, match="404"):
            Endpoint("no-such/model", f"http://127.0.0.1:{port}/v1").reply(requests[:1])
    finally:
        server.kill()
        server.wait()
