"""Run `distilbeam` on a Dask cluster of two worker processes that this program starts."""

from __future__ import annotations

import sys


def main() -> None:
    from dask.distributed import LocalCluster

    from distilbeam.pipelines.cli import main

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster:
        beam = ["--", "--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"]
        sys.argv = ["distilbeam", *sys.argv[1:], *beam]
        try:
            main.main()
        except SystemExit as e:
            status = e.code
    sys.exit(status)


if __name__ == "__main__":
    main()
