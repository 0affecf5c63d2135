"""What is trained and run."""
