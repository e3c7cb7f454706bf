"""The streaming job: messages to soft labels, each message once, whatever dies on the way.

Read in this order: settings, message, decode, offsets, kafka_client, kafka_read, label_messages, write_panes, settled, prism,
checks, state, job, stream_job. Imports: transforms, labelling, jobs, engine.
"""
