"""The reading task measured: accuracy by kind of question beside that of guessing, and tiles."""
