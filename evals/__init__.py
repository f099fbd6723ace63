"""What one does with a trained model, and what a run would cost: `python -m evals.NAME`, see README.md."""

import cli  # noqa: F401, first: from here on a signal ends a command quietly
