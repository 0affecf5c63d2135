"""One loop, several objectives."""
