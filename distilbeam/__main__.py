"""The command line's entry: `distilbeam` and `python -m distilbeam`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules are imported, which takes seconds on a cold disk, is no traceback."""
    try:
        from distilbeam.pipelines.cli.main import main as run
    except KeyboardInterrupt:
        print("stopped; the same command begins again", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
