"""The offline task: questions about handwritten digits on a canvas, coarse to fine."""
