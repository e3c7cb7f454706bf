"""Real engines for tests, where they are found: Prism, a Kafka broker, and librdkafka's mock broker, which needs no Java."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import SUPPORT, make_table

from distilbeam.teacher.softlabels import read_manifest

ENGINES = Path(__file__).resolve().parents[3] / "shared" / "engines"  # beside the repository, on some machines
SCHEMA = "key:string,x:float32[4]"


def find_prism() -> Path | None:
    """Return the program that `PRISM` names, that is beside the repository or on the PATH; None where there is none."""
    named = os.environ.get("PRISM") or shutil.which("prism")
    if named is None and (ENGINES / "prism").exists():
        named = subprocess.run([ENGINES / "prism"], capture_output=True, text=True, check=True).stdout.strip()
    return None if named is None else Path(named)


def require_prism() -> Path:
    """Return the program, or skip the test with the reason."""
    found = find_prism()
    if found is None:
        pytest.skip("Prism is not here: name it with PRISM, or put it on the PATH")
    return found


class Broker:
    """A real Kafka broker of one node in a folder, which keeps its topics when it is killed and started again.

    Args:
      folder: where it keeps them.

    Attributes:
      address: where it listens.
    """

    def __init__(self, folder: Path) -> None:
        jars = os.environ.get("KAFKA_JARS")
        self.start_script = ENGINES / "kafka" / "start" if jars is None else Path(jars).parent / "start"
        if shutil.which("java") is None:
            pytest.skip("a Kafka broker needs Java 17")
        if not self.start_script.exists():
            pytest.skip(
                "a Kafka broker is not here: name its folder of jars, with the script start beside, with KAFKA_JARS"
            )
        self.folder, self.port, self.process = folder, 0, None
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process: subprocess.Popen[str] | None = subprocess.Popen(
            self._command(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.rpartition(":")[2])
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.address, "log_level": 0})
        for _ in range(60):
            try:
                admin.list_topics(timeout=1)
            except Exception:  # noqa: BLE001  # of a client whose errors are one class
                time.sleep(0.5)
            else:
                return
        raise AssertionError("the broker does not answer")

    def _command(self) -> list[str | Path]:
        return [self.start_script, self.folder, str(self.port)]

    def make_topic(self, name: str, partitions: int = 4, **settings: str) -> None:
        """Make a topic."""
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.address})
        admin.create_topics([NewTopic(name, partitions, 1, config=settings)])[name].result(30)

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


class GuardedBroker(Broker):
    """A broker that asks for names and passwords at a second address, and lets each do what it was allowed.

    Args:
      folder: where it keeps its topics.
      passwords: by the names of those who may connect.

    Attributes:
      guarded_address: where it asks; whoever comes to `address` may do everything.
    """

    def __init__(self, folder: Path, passwords: dict[str, str]) -> None:
        self.passwords = passwords
        super().__init__(folder)

    def _command(self) -> list[str | Path]:
        """Let the script write its settings and, in the place of the broker, start it with more of them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            guarded = f"SASL_PLAINTEXT://127.0.0.1:{probe.getsockname()[1]}"
        self.guarded_address = guarded.rpartition("/")[2]
        users = " ".join(f'user_{name}="{password}"' for name, password in self.passwords.items())
        login = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        more = f"""sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config={login}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "more.properties").write_text(more)
        program = self.folder / "java"
        program.write_text(
            f"""#!/bin/bash
settings={self.folder}/server.properties
if [ "${{@: -2:1}}" = kafka.Kafka ]; then
  sed -i -e 's|^\\(advertised.\\)\\?listeners=.*|&,{guarded}|' -e 's|^listener.security.*|&,SASL_PLAINTEXT:SASL_PLAINTEXT|' $settings
  cat {self.folder}/more.properties >>$settings
fi
exec {shutil.which("java")} "$@"
"""
        )
        program.chmod(0o755)
        return ["env", f"PATH={self.folder}:{os.environ['PATH']}", *super()._command()]

    def allow(self, user: str, what: str, topic: str) -> None:
        """Allow somebody to do something with a topic: READ, or DESCRIBE alone."""
        from confluent_kafka.admin import (
            AclBinding,
            AclOperation,
            AclPermissionType,
            AdminClient,
            ResourcePatternType,
            ResourceType,
        )

        pattern, allowed = ResourcePatternType.LITERAL, AclPermissionType.ALLOW
        rule = AclBinding(ResourceType.TOPIC, topic, pattern, f"User:{user}", "*", AclOperation[what], allowed)
        admin = AdminClient({"bootstrap.servers": self.address})  # held: it is ended with its last reference
        admin.create_acls([rule])[rule].result(30)


@contextmanager
def mock_broker() -> Iterator[str]:
    """Run librdkafka's mock broker in this process; yield its address. Topics make themselves, with four partitions."""
    confluent_kafka = pytest.importorskip("confluent_kafka", reason="needs the extra kafka")
    owner = confluent_kafka.Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    brokers = owner.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
    del owner


def rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Make rows that the messages hold."""
    return make_table(count, seed, labelled=False).to_pylist()


def send(address: str, topic: str, values: Sequence[Any], **how: Any) -> None:
    """Send messages and wait until the broker has them.

    Args:
      address: of the broker.
      topic: the topic.
      values: rows, bytes, None for a tombstone, or mappings of confluent-kafka's arguments under "message".
      how: further arguments for each message, or `settings` of the producer.
    """
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": address, "linger.ms": 20, **how.pop("settings", {})})
    for value in values:
        message = value["message"] if isinstance(value, dict) and "message" in value else {"value": value}
        content = message["value"]
        encoded = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        producer.produce(topic, **{**how, **message, "value": encoded})
        producer.poll(0)
    assert producer.flush(30) == 0


def command(config: Path, *arguments: str) -> list[str]:
    """Return the command line of `distilbeam stream`."""
    return [sys.executable, "-m", "distilbeam", "stream", str(config), *arguments]


def environment(prism: Path | None = None) -> dict[str, str]:
    """Return the environment of a streaming job: the teacher's module, and Prism or none."""
    inherited = {name: value for name, value in os.environ.items() if name != "PRISM"}
    path = {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return inherited | path | ({} if prism is None else {"PRISM": str(prism)})


def stream(config: Path, *arguments: str, prism: Path | None = None, timeout: float = 120) -> Any:
    """Run `distilbeam stream` to its end."""
    return subprocess.run(
        command(config, *arguments),
        env=environment(prism),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=config.parent,
    )


@contextmanager
def streaming(config: Path, *arguments: str, prism: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `distilbeam stream` in the block; it is ended with it."""
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen(
            command(config, *arguments),
            env=environment(prism),
            stdout=lines,
            stderr=lines,
            text=True,
            cwd=config.parent,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            lines.seek(0)
            print(lines.read())


def labels_in(out: Path) -> pa.Table:
    """Read all labels of a dataset; an empty table where there are none."""
    try:
        paths = read_manifest(out).paths()
    except ValueError:
        return pa.table({"example_id": pa.array([], pa.string())})
    return pa.concat_tables([pq.read_table(path) for path in paths], promote_options="permissive")


def letters_in(folder: Path) -> list[dict[str, Any]]:
    """Read all dead letters of a folder, in the order of their offsets."""
    found = [letter for file in folder.glob("*.parquet") for letter in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda letter: (letter["partition"], letter["offset"]))


def right_logprobs(x: Any) -> np.ndarray[Any, Any]:
    """Compute in float64 what `LoggingTeacher` answers for rows of features [n, 4]: log-probabilities [n, 3]."""
    logits = 2.5 * np.asarray(x, np.float64)[:, :3]
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def wait_for(condition: Any, timeout: float = 300.0, process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so, for as long as a slow machine may take, and no longer than a process lives."""
    end = time.monotonic() + timeout
    while not condition():
        assert process is None or process.poll() is None, "the process has ended before"
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)
