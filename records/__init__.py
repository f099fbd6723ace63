"""Records: their rules, and the tools that read logs, compare runs, plot, run ablations and check records."""
