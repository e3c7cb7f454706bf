"""Label what arrives in a directory: micro-batches, each frozen in a journal before any work.

`watching.watch` is the entry point. `arrivals` decides which files are whole and new, `windows` keeps the journals,
`window_work` carries the phases out for the files of one window.
"""
