"""TokenFLEX inside the public evaluation harnesses, and every count in one table."""
