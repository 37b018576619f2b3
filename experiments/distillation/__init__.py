"""A stock model distilled to every count, beside resizing the picture before the encoder."""
