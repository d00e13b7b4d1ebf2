"""What is taken from the environment, and what in it was meant for others.

Called once by whoever owns a process: the command line, a worker, a server that we start. What they
start in turn inherits it.
"""

import os
import re

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(WORLD_SIZE|RANK)|LOCAL_PROCESS_COUNT|ROLE_NAME|NODE_RANK"
    r"|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
)
"""By these torchrun, accelerate, MPI and pods of training jobs tell a process that it is one of
many. Ours are not theirs: a training in one of them would wait for others that do not exist."""


def own_environment() -> None:
    """Put this process's environment right: no other launcher's orders, and no proxy before our own
    servers, which are on this machine.
    """
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    for name in ("NO_PROXY", "no_proxy"):
        known = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in known:
            os.environ[name] = ",".join([*known, *(h for h in LOOPBACK if h not in known)])
