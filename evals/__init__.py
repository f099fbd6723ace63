"""What one does with a trained model, and what a run would cost: `python -m evals.NAME`, see README.md."""
