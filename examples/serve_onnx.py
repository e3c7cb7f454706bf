"""Use an exported student in a program without distilbeam: score a file of JSON lines, or serve predictions over HTTP.

    pip install numpy onnxruntime                       # pillow for images, tokenizers for a student with a tokenizer.json
    python serve_onnx.py EXPORT --data test.jsonl --label intent
    python serve_onnx.py EXPORT --port 8080
    curl -d '[{"text": "where is my card"}]' localhost:8080

EXPORT is what `distilbeam export` wrote, with its own `reader.py`; copy the folder wherever this program runs. The
server is for trying things out: on the loopback, one request at a time, at most 1,000 rows and 16 MB of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

ROWS, BYTES = 1000, 16 * 2**20


def open_export(folder: Path) -> Any:
    """Load an export by the reader that lies in it, whose code is run: take folders of people whom you trust."""
    spec = importlib.util.spec_from_file_location("reader", folder / "reader.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} holds no reader.py; name a folder that distilbeam export wrote")
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    return reader.Export(folder)


def score(export: Any, data: Path, label: str | None) -> None:
    """Print the prediction of each line, and the accuracy at the end where the lines have a label."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may have had enough
    rows = right = 0
    with data.open() as lines:
        for batch in batches(json.loads(line) for line in lines if line.strip()):
            for row, answer in zip(batch, export.predict(batch), strict=True):
                print(json.dumps(answer))
                rows += 1
                right += label is not None and answer["prediction"] == str(row[label])
    if label is not None:
        print(json.dumps({"rows": rows, "accuracy": right / max(rows, 1)}))


def batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Gather rows."""
    while batch := list(islice(rows, 64)):
        yield batch


def serve(export: Any, port: int) -> None:
    """Answer POST requests, a JSON list of rows each, until the program is interrupted."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 20  # seconds in which a request must have come

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= BYTES:
                self.send_error(413, f"a request must have a Content-Length of at most {BYTES} bytes")
                return
            try:
                rows = json.loads(self.rfile.read(length))
                if not isinstance(rows, list) or len(rows) > ROWS:
                    raise ValueError(f"a request must be a list of at most {ROWS} rows")
                if export.input.get("kind") == "image":
                    raise ValueError("JSON holds no images; call Export.predict with their bytes")
                answer = json.dumps(export.predict(rows)).encode()
            except KeyError as e:
                self.send_error(400, f"a row lacks the column {e}")
            except (ValueError, TypeError, AttributeError) as e:
                self.send_error(400, str(e).splitlines()[0] if str(e) else "no rows that the model can read")
            else:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(answer)

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder that `distilbeam export` wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="JSON lines to predict; an image is the path of its file")
    what.add_argument("--port", type=int, help="serve on this port; 0 for any free one")
    parser.add_argument("--label", help="column of --data with the true class")
    arguments = parser.parse_args()
    export = open_export(arguments.export)
    if arguments.data is not None:
        score(export, arguments.data, arguments.label)
    else:
        serve(export, arguments.port)


if __name__ == "__main__":
    main()
