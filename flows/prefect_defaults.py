"""Settings that Prefect reads when it is first imported; what the user set stays.

Import this before prefect.
"""

import os

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The library's log lines belong on the page of the task run.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "foldstack",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}

AGAINST_OUTAGES = {"PREFECT_CLIENT_RETRY_EXTRA_CODES": "500"}
"""For those who talk to a server that is looked after: it answers 500 while its database is away.

Prefect then tries again for a minute, as it does by itself where the server is away. Not for a
temporary server: its database is a file, and a 500 from it (a full disk, for one) stays.
"""

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
