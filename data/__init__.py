"""What makes, fetches and reads training data. Each command runs as `python -m data.NAME`; see README.md."""

import cli  # noqa: F401, first: from here on a signal ends a command quietly
