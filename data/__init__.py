"""What makes, fetches and reads training data. Each command runs as `python -m data.NAME`; see README.md."""
