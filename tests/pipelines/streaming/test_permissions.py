"""A real broker that asks who is there: what somebody may not do is said before the first message is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from engines import SCHEMA, GuardedBroker, labels_in, rows, send
from problem import asked

from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.streaming.job import StreamJob
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.pipelines.streaming.state import StreamState

TOPIC = "examples"
USERS = ("reader", "looker", "stranger")
pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GuardedBroker]:
    pytest.importorskip("confluent_kafka", reason="needs the extra kafka")
    broker = GuardedBroker(tmp_path / "broker", dict.fromkeys(USERS, "secret"))
    try:
        broker.make_topic(TOPIC, 2)
        broker.allow("reader", "READ", TOPIC)
        broker.allow("looker", "DESCRIBE", TOPIC)
        send(broker.address, TOPIC, rows(30))
        yield broker
    finally:
        broker.kill()


def test_who_may_not_read_hears_it_in_a_sentence_and_who_may_needs_no_group(
    broker: GuardedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilbeam.pipelines.streaming.kafka_client.ANSWER_S", 5.0)
    model = {"model": "logging_teacher:LoggingTeacher", "arguments": {"log": str(tmp_path / "asked.log")}}
    teacher = {"kind": "torch", **model, "input": {"columns": ["x"]}}
    path, out = tmp_path / "job.toml", tmp_path / "labels"
    path.write_text(
        tomli_w.dumps({"data": {"pool": "unused", "id": "key", "carry": ["x"], "num_classes": 3}, "teacher": teacher})
    )
    config = load_any_config(path)
    assert isinstance(config, LabelConfig)

    def label(user: str, password: str = "secret", *more: str) -> StreamState:
        login = ("security.protocol=SASL_PLAINTEXT", "sasl.mechanism=PLAIN", f"sasl.username={user}")
        source, consumer = f"kafka:{broker.guarded_address}:{TOPIC}", (*login, f"sasl.password={password}", *more)
        settings = StreamSettings(source=source, out=str(out), schema=SCHEMA, until="latest", consumer=consumer)
        return StreamJob(config, settings, ("--runner=FnApiRunner",)).run()

    for user in ("stranger", "looker"):
        with pytest.raises(ValueError, match=rf"topic {TOPIC} at \S+ cannot be read: .*Topic authorization failed$"):
            label(user)
    with pytest.raises(ValueError, match=r"refuse the connection: .*Invalid username or password.*--consumer$"):
        label("reader", "wrong")
    with pytest.raises(ValueError, match=r"--consumer: the group monitor cannot be told what is settled: .*Group auth"):
        label("reader", "secret", "group.id=monitor")
    assert not asked(tmp_path)
    assert not out.exists()
    assert label("reader").labels == 30
    assert labels_in(out).num_rows == 30
