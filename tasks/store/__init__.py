"""Where what a stage made is kept: artifacts, who may make them, and what of them can go.

- `artifacts`: The store of artifacts: directories published all at once under the digest of their
  making.
- `garbage`: What lies in the store, and what of it can go.
- `leases`: Leases: one process at a time makes an artifact, on whatever machine, and a dead one
  loses it.
- `manifest`: What an artifact says about itself: its files, where it came from, what was measured.
- `object_leases`: Leases as objects on a storage that machines share which have no disk in common.
- `object_storage`: Artifacts on object storage, S3 or whatever else fsspec speaks: for machines
  that share no disk.
"""
