"""Conversion of SAM-2 checkpoints: other people's files to ours, and back."""
