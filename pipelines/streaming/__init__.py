"""The streaming job: messages to soft labels, each message once, whatever dies on the way.

Read in this order: settings, message, offsets, journal, registry, schemas, event_time, decode, restriction, batch_source,
kafka_client, kafka_ends, kafka_reader, kafka_read, settled_ids, pubsub_reader, pubsub_read, beam_sources, letters,
label_messages, write_panes, pipeline, stop_file, checks, state, job, stream_job.
Imports: transforms, labelling, pool, engine, and ingest's types of columns.
"""
