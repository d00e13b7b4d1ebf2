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

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
