"""Talk to it."""
