"""The paper's claim put to the test: models that differ in counts alone, asked at every count."""
