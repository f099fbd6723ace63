"""What makes, fetches and reads training data. Each command runs as `python data/NAME.py`; see README.md."""
