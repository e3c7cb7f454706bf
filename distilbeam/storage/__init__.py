"""Files: paths of disks and buckets, files that appear whole or not at all, leases.

Read in this order: paths, atomic, files, lease, stores, private_folders.
Imports: nothing of distilbeam.
"""
