"""What one does with a trained model, and what a run would cost. Each command runs as `python -m evals.NAME`; see README.md."""
