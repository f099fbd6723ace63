"""Records: their rules, and the tools that read logs, compare runs, plot, run ablations and check records."""

import cli  # noqa: F401, first: from here on a signal ends a command quietly
