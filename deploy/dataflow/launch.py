"""What a Flex Template's launcher starts: the streaming job, with the parameters of `metadata.json` as options."""

from distilbeam.pipelines.streaming.stream_job import main

if __name__ == "__main__":
    main()
