"""What surrounds a stage: the home of results, secrets, the machine, device and threads.

- `cgroup`: Memory and processors that the control group of this process leaves it: those of a
  container.
- `execution`: Where a stage computes and with how many threads: never a part of what it computes.
- `hardware`: The machine that a figure was measured on, in words.
- `home`: Where results go, and the sentence for when there is no room: every part says it in these
  words.
- `inherited`: What is taken from the environment, and what in it was meant for others.
- `redaction`: Secrets come from the environment and go nowhere else: into no log, page, file or
  traceback.
- `unheard`: A process that prints goes on when nobody reads it any more.
"""
