"""See docs/explanation/architecture.md for what lives here."""
