"""Built-in sample data: questions about handwritten digits on a canvas, coarse to fine."""
