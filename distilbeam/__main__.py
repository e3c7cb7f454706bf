"""Run the command line as `python -m distilbeam`."""

from distilbeam.pipelines.cli.main import main

main()
