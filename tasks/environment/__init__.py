"""What surrounds a stage: the home of results, secrets, the machine, device and threads.

- `execution`: Where a stage computes and with how many threads: never a part of what it computes.
- `hardware`: The machine that a figure was measured on, in words.
- `home`: Where results go, and the sentence for when there is no room: every part says it in these
  words.
- `redaction`: Secrets come from the environment and go nowhere else: into no log, page, file or
  traceback.
"""
