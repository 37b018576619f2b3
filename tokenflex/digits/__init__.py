"""Built-in sample data: questions about handwritten digits, on a canvas and in moving clips."""
