"""Bytes that survive: digests, files that outlive the machine's death, tensors kept part after
part.

- `digest`: SHA-256 of values, files, folders and of the code behind a computation.
- `durable`: Files that are still there when the machine has died: on its disk, not in its memory.
- `mapped_memory`: Memory of what lies in files: it is read when it is used, and given back when
  told so.
- `spool`: Tensors made part after part, each kept on disk as soon as it is made.
"""
