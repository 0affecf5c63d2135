"""Text in, packed rows out."""
