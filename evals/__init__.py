"""What one does with a trained model. Each command runs as `python evals/NAME.py CHECKPOINT ...`; see README.md."""
