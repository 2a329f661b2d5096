"""What happens while the store does not answer, and after it."""
