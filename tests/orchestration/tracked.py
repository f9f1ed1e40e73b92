"""What a tracker is fed with, and how what it left is read back in the formats' own terms."""

import json
import os
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event

from orchestration.results import TrialRecord
from orchestration.tracking import make_trackers
from trainers.paths import RunPaths

WANDB_HEADER_BYTES = 7
LEVELDB_BLOCK_BYTES = 32 * 1024
LEVELDB_FULL, LEVELDB_LAST = 1, 4
EXAMPLES = (0, 16, 32)


def row(examples: int, offset: float = 0.0) -> dict:
    """The row of the untouched base has no train_loss."""
    return {
        "examples": examples,
        "steps": examples // 16,
        "tokens": 10 * examples,
        "train_loss": None if examples == 0 else 3.0 - examples / 64 + offset,
        "eval_loss": 3.5 - examples / 64 + offset,
        "lr": 0.001,
        "seconds": 1.0,
    }


def record(
    name: str, num_rows: int, status: str = "unfinished", offset: float = 0.0
) -> TrialRecord:
    return TrialRecord(
        name=name,
        candidate={"lora_rank": 4, "target": ["attn", "mlp"]},
        status=status,
        reason="",
        rows=tuple(row(examples, offset) for examples in EXAMPLES[:num_rows]),
    )


def track(kind: str, folder: Path) -> None:
    """Two trials that run at the same time, updated more often than they have rows."""
    (tracker,) = make_trackers([kind], "sweep", RunPaths(folder))
    for num_rows in (1, 2, 2, 3):
        tracker.update(record("r4-attn+mlp-a", num_rows))
        tracker.update(record("r4-attn+mlp-b", num_rows, offset=0.25))
    for name, status, offset in (("a", "finished", 0.0), ("b", "stopped", 0.25)):
        tracker.finish(record(f"r4-attn+mlp-{name}", 3, status, offset))


def expected_series(metric: str, offset: float = 0.0) -> list[tuple[int, float]]:
    rows = [row(examples, offset) for examples in EXAMPLES]
    return [(r["examples"], r[metric]) for r in rows if r[metric] is not None]


def wandb_records(path: Path) -> Iterator:
    """Records of a .wandb file: a LevelDB log (crc, length, type; blocks of 32 KiB) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), WANDB_HEADER_BYTES, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = LEVELDB_BLOCK_BYTES - position % LEVELDB_BLOCK_BYTES
        if left < WANDB_HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (LEVELDB_FULL, LEVELDB_LAST):
            found = Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


def wandb_history(records: list) -> list[dict]:
    """The logged rows, as JSON values by key."""
    rows = []
    for found in records:
        if found.WhichOneof("record_type") == "history":
            items = found.history.item
            rows.append(
                {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of a folder's one event file: TFRecords of Event messages."""
    (path,) = folder.iterdir()
    data, position = path.read_bytes(), 0
    series: dict[str, list[tuple[int, float]]] = {}
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Event()
        event.ParseFromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4
        for value in event.summary.value:
            series.setdefault(value.tag, []).append((event.step, value.simple_value))
    return series


FAKE_LOG, FAKE_FAULT = "FAKE_WANDB_LOG", "FAKE_WANDB_FAULT"
FAKE = """
import json, os, time

FAULT = os.environ.get("FAKE_WANDB_FAULT", "")


def note(**what):
    with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + chr(10))


def fail(at, mode):
    where, _, how = FAULT.partition(" ")
    if where.removeprefix("always-") != at or (mode == "offline" and where == at):
        return
    if how == "hangs":
        time.sleep(1000)
    if how == "dies":
        os._exit(139)
    raise RuntimeError("the network is unreachable\\nat line 2")


fail("import", "online")


class Settings:
    def __init__(self, **values):
        pass


def setup(settings=None):
    pass


def login(**values):
    fail("login", "online")
    return True


class Run:
    def __init__(self, id, mode):
        self.id, self.mode, self.summary = id, mode, {}

    def log(self, values, step):
        if step == 16:
            fail("log", self.mode)
        note(call="log", id=self.id, mode=self.mode, step=step, values=values)

    def finish(self):
        fail("finish", self.mode)
        note(call="finish", id=self.id, mode=self.mode, **self.summary)


def init(*, id, mode, **values):
    fail("init", mode)
    kept = {key: values[key] for key in ("resume", "group", "name", "dir")}
    note(call="init", id=id, mode=mode, **kept)
    return Run(id, mode)
"""
"""A wandb that writes down what is asked of it and has a fault: "WHERE raises", "WHERE hangs" or "WHERE dies", not
where the run is offline unless "always-WHERE ..."."""


class FakeWandb:
    """The fake in the place of wandb, for every process that gets this environment."""

    def __init__(self, folder: Path, fault: str = "") -> None:
        (folder / "wandb.py").write_text(FAKE)
        self.log = folder / "calls.jsonl"
        self.environment = {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(folder), os.environ.get("PYTHONPATH")))
            ),
            FAKE_LOG: str(self.log),
            FAKE_FAULT: fault,
        }

    def calls(self, call: str, **where: object) -> list[dict[str, Any]]:
        """What was asked, of a kind, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines]
        wanted = {"call": call} | where
        return [one for one in found if all(one.get(key) == wanted[key] for key in wanted)]


class WandbServer(ThreadingHTTPServer):
    """As much of wandb's server as a run of metrics needs, until it is gone."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def vanish(self) -> None:
        """Answers nobody any more."""
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = _answer(json.loads(body)) if self.path == "/graphql" else None
        text = json.dumps({"data": data} if data is not None else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        return


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    if "upsertBucket" in asked["query"]:
        project = {"id": "p", "name": "tenfold", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": asked["variables"]["name"], "displayName": "d"}
        bucket |= {"config": "{}", "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "createRunFiles" in asked["query"]:
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {"model": None, "serverInfo": {"features": []}, "organization": None}
